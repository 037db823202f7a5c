"""The notebooks are what their sources say, were run to their end, and run at a small setting."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

FOLDER = Path(__file__).parent.parent / "tutorials"
SOURCES = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))
SMALL: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "small.yaml").read_text("utf-8"))
MOST_SECONDS = 600
MOST_BYTES = 1_000_000


def built(*args: str) -> "subprocess.CompletedProcess[str]":
    # Kernels share the cores with other tests.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "build.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def notebook_of(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def source_of(name: str) -> Any:
    return jupytext.read(FOLDER / f"{name}.py")


def tagged_parameters(name: str) -> str:
    (cell,) = (c for c in source_of(name).cells if "parameters" in c.metadata.get("tags", []))
    return cell.source


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assert_ran(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert notebook.metadata.papermill.exception is None


@pytest.mark.parametrize("name", SOURCES)
def test_a_committed_notebook_has_the_cells_of_its_source(name: str) -> None:
    committed = notebook_of(FOLDER / f"{name}.ipynb")
    cells = [(cell.cell_type, cell.source) for cell in committed.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in source_of(name).cells], (
        f"Run: python tutorials/build.py {name}"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_committed_notebook_was_run_to_its_end_in_ten_minutes_and_has_a_picture(
    name: str,
) -> None:
    path = FOLDER / f"{name}.ipynb"
    committed = notebook_of(path)
    assert_ran(committed)
    assert 0 < committed.metadata.papermill.duration < MOST_SECONDS
    shown = [out.get("data", {}) for cell in code_cells(committed) for out in cell.outputs]
    assert any("image/png" in data for data in shown)
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", SOURCES)
def test_a_committed_notebook_shows_no_log_and_no_folder_of_the_machine_that_ran_it(
    name: str,
) -> None:
    outputs = [out for c in code_cells(notebook_of(FOLDER / f"{name}.ipynb")) for out in c.outputs]
    assert "stderr" not in {out.get("name") for out in outputs}
    texts = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    texts += [out.get("data", {}).get("text/html", "") for out in outputs]
    folders = re.findall(r"(?<![\w.~])/(?:home|root|work|tmp|Users|usr|opt)/\S*", "\n".join(texts))
    assert folders == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_begins_with_what_to_expect_and_sets_its_folder(name: str) -> None:
    first = source_of(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {name[0]}. ")
    for promised in ("Time", "Memory", r"(?:What to e|E)xpect"):
        assert re.search(rf"\*\*{promised}\*\*", first.source), promised
    assert re.search(r'^folder = "runs/', tagged_parameters(name), flags=re.MULTILINE)


@pytest.mark.parametrize("name", SOURCES)
def test_the_small_setting_changes_parameters_that_the_source_has(name: str) -> None:
    assigned = {
        target.id
        for node in ast.parse(tagged_parameters(name)).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert SMALL[name] and set(SMALL[name]) <= assigned - {"folder"}


def run_in_this_process(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> None:
    """Run a source at the small setting, with these of its parameters changed too."""
    values = {**SMALL[name], **values, "folder": str(folder)}
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    found: dict[str, Any] = {}
    for cell in code_cells(source_of(name)):
        exec(compile(cell.source, f"{name}.py", "exec"), found)
        if "parameters" in cell.metadata.get("tags", []):
            found.update(values)


def test_the_first_source_runs_in_this_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"seeds": [0], "n_steps": 40, "n_eval_batches": 2}
    run_in_this_process(SOURCES[0], tmp_path / "run", monkeypatch, **tiny)
    assert (tmp_path / "run").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_runs_at_the_small_setting(name: str, tmp_path: Path) -> None:
    result = built(name, "--small", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_ran(notebook_of(tmp_path / f"{name}.ipynb"))


@pytest.mark.slow
def test_a_notebook_with_other_cells_than_its_source_is_found_and_nothing_is_run(
    tmp_path: Path,
) -> None:
    name = SOURCES[0]
    assert built(name, "--check").returncode == 0
    old = built(name, "--check", "--output", str(tmp_path))
    assert (
        old.returncode,
        old.stdout.startswith(f"Notebooks that differ from their source: {name}."),
    ) == (
        1,
        True,
    )
    notebook = notebook_of(FOLDER / f"{name}.ipynb")
    notebook.cells[0].source += "!"
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    assert built(name, "--check", "--output", str(tmp_path)).returncode == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("8_no_such",), "There is no tutorial '8_no_such'. Tutorials: 1_toy_pair"),
        (("--small", "--output", str(FOLDER)), "would replace the committed notebooks"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(args: tuple[str, ...], said: str) -> None:
    result = built(*args)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
