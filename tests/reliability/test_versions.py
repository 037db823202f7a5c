"""What another version of a library may take away. docs/reliability.md says which were tried."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

import pytest

import sae_lens_dfc
from sae_lens_dfc.data.text.datasets import open_rows
from tests.reliability.conftest import Jobs

ROOT = Path(__file__).parents[2]

REMOVED = (
    *("HookedTransformer", "HookedTransformerConfig", "HookedEncoder", "HookedEncoderDecoder"),
    *("HookedAudioEncoder", "BertNextSentencePrediction", "components", "loading"),
    *("loading_from_pretrained", "train", "utils"),
)
"""What TransformerLens 3.9 has and 4.0 has not: `_REMOVED_IN_4_0` in 4.3's `__init__.py`."""

WITHOUT = f"""
import sys
import sae_lens  # which itself imports some of it where TransformerLens is older than 4
import transformer_lens

for name in {REMOVED}:
    transformer_lens.__dict__.pop(name, None)
    gone = f"transformer_lens.{{name}}"
    for module in [gone, *(m for m in sys.modules if m.startswith(gone + "."))]:
        sys.modules[module] = None

from sae_lens_dfc.__main__ import main

sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_what_transformer_lens_4_removed_all_works_but_what_asks_for_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    """It shows that nothing of ours imports it when models are opened and trained on.

    With a TransformerLens below 4 it cannot show that SAELens does without, which is imported
    first, nor how
    TransformerLens 4 computes: for that TransformerLens 4 must be installed, and then nothing is
        there to be taken away.
    """
    arguments = [*jobs.of("train", tmp_path / "run"), "--training-tokens", "640"]
    asked_for = command(*arguments, "--model-a.model-class-name", "HookedTransformer")
    assert asked_for.returncode == 1, asked_for.stderr
    assert "this TransformerLens has none" in asked_for.stderr.splitlines()[-1]
    assert "Traceback" not in asked_for.stderr and not (tmp_path / "run").exists()
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "cfg.json").is_file()


def imports(tree: ast.AST) -> Iterator[str]:
    """What a file imports as soon as it is imported itself: not in a function, nor for a type
    checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(node.orelse, []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node)


def gone(names: Iterator[str]) -> list[str]:
    return [n for n in names if n.startswith(tuple(f"transformer_lens.{r}" for r in REMOVED))]


def test_what_is_imported_at_once_is_told_from_what_waits() -> None:
    at_once = "try:\n    from transformer_lens import utils\nexcept ImportError: ..."
    assert gone(imports(ast.parse(at_once))) == ["transformer_lens.utils"]
    assert gone(imports(ast.parse("import transformer_lens.components.mlps"))) != []
    for waits in ("def f():\n    ", "if TYPE_CHECKING:\n    "):
        assert gone(imports(ast.parse(waits + "from transformer_lens import utils"))) == []
    assert gone(imports(ast.parse("from transformer_lens.utilities import lm_utils"))) == []


@pytest.mark.parametrize("folder", ["sae_lens_dfc", "tests", "benchmarks"])
def test_no_file_needs_what_transformer_lens_4_removed_to_be_imported(folder: str) -> None:
    """So commands start, and tests are collected."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {
        str(file.relative_to(ROOT)): names
        for file in files
        if (names := gone(imports(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert found == {}


def test_the_page_says_from_which_versions_on_it_was_tried() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    needed = [r for r in requires("sae-lens-dfc") or [] if "extra ==" not in r]
    assert len(needed) > 10
    for one in needed:
        name, floor = re.fullmatch(r"([\w-]+).*>=([\w.]+).*", one).groups()  # type: ignore[union-attr]
        assert f"{name} {floor}" in page, one


PROMISED = {"datasets", "datasets.distributed", "datasets.exceptions"}
"""Modules of datasets that its reference documents."""


def test_no_command_needs_more_of_datasets_to_start_than_it_promises() -> None:
    files = Path(sae_lens_dfc.__file__).parent.rglob("*.py")
    at_the_top = (node for file in files for node in ast.parse(file.read_text("utf-8")).body)
    modules = {node.module or "" for node in at_the_top if isinstance(node, ast.ImportFrom)}
    assert {one for one in modules if one.split(".")[0] == "datasets"} <= PROMISED


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("packaged_modules", "_PACKAGED_DATASETS_MODULES"),
        ("data_files", "get_data_patterns"),
        ("data_files", "sanitize_patterns"),
        ("data_files", "resolve_pattern"),
        ("utils.extract", "Extractor"),
    ],
)
def test_a_version_of_datasets_without_a_private_name_is_named(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    if name != "get_data_patterns":
        listed = "configs: [{config_name: default, data_files: a.jsonl}]"
        (tmp_path / "README.md").write_text(f"---\n{listed}\n---\n")
    assert open_rows(str(tmp_path)).columns == ["text"]
    monkeypatch.delattr(import_module(f"datasets.{module}"), name)
    with pytest.raises(
        ValueError, match=rf"^Version \S+ of datasets has no {module}\.{name}, .*\.$"
    ):
        open_rows(str(tmp_path))
