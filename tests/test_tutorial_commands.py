"""What a reader can copy from a tutorial's text is a command of this version."""

import re
import shlex
from pathlib import Path

import pytest

from sae_lens_dfc.cli.main import options_class, options_of

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("[0-9]_*.py"))


def commands(source: str) -> list[list[str]]:
    """The commands in a source's fenced blocks, each on one line or going on after a backslash."""
    text = re.sub(r"^# ?", "", source, flags=re.MULTILINE).replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sae-lens-dfc ")]


def test_commands_are_found_in_their_blocks() -> None:
    source = (
        "# ```\n# sae-lens-dfc steer RUN \\\n#     --model a\n# ```\n# and `sae-lens-dfc demo`\n"
    )
    assert commands(source) == [["steer", "RUN", "--model", "a"]]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_of_a_tutorial_parses(path: Path) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        assert isinstance(options_of(command[0], command), options_class(command[0]))
