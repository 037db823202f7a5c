"""What another version of a library may take away. docs/reliability.md says which were tried."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.reliability.conftest import Jobs

ROOT = Path(__file__).parents[2]

WITHOUT_HOOKED_TRANSFORMER = """
import sys
import sae_lens  # which itself still asks for it
import transformer_lens

del transformer_lens.HookedTransformer
sys.modules["transformer_lens.HookedTransformer"] = None
transformer_lens.__dict__.pop("loading_from_pretrained", None)

from sae_lens_dfc.__main__ import main

sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-c", WITHOUT_HOOKED_TRANSFORMER, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_hooked_transformer_all_works_but_what_asks_for_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    arguments = [*jobs.of("train", tmp_path / "run"), "--training-tokens", "640"]
    asked_for = command(*arguments, "--model-a.model-class-name", "HookedTransformer")
    assert asked_for.returncode == 1, asked_for.stderr
    assert "this TransformerLens has none" in asked_for.stderr.splitlines()[-1]
    assert "Traceback" not in asked_for.stderr and not (tmp_path / "run").exists()
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "cfg.json").is_file()


def test_the_page_says_from_which_versions_on_it_was_tried() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    needed = [r for r in requires("sae-lens-dfc") or [] if "extra ==" not in r]
    assert len(needed) > 10
    for one in needed:
        name, floor = re.fullmatch(r"([\w-]+).*>=([\w.]+).*", one).groups()  # type: ignore[union-attr]
        assert f"{name} {floor}" in page, one
