"""What the README says in its sentences and tables is there; tests/test_docs.py runs its blocks of
code."""

import re
from pathlib import Path

import pytest

from sae_lens_dfc.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_in_the_readme_is_a_command_with_those_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = re.findall(r"sae-lens-dfc (\w+)([^`|\n]*)", README)
    assert commands
    for command, rest in commands:
        # An architecture's own flags are there with it alone.
        architecture = re.findall(r"--architecture \w+", rest)
        with pytest.raises(SystemExit) as exit_:
            main([command, *" ".join(architecture).split(), "--help"])
        assert exit_.value.code == 0
        usage = capsys.readouterr().out
        for flag in re.findall(r"--[\w.-]+", rest):
            assert flag in usage, f"{command} has no {flag}"


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


def test_files_the_readme_points_to_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
