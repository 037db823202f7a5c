"""Builds the notebooks from their sources: runs `N_name.py` and writes `N_name.ipynb` with its outputs and figures.

python tutorials/build.py                      # all, at the committed settings
python tutorials/build.py 1_toy_pair           # one
python tutorials/build.py --small --output DIR # with the values of small.yaml, elsewhere
python tutorials/build.py --check              # runs nothing: lists the notebooks whose cells differ from their source
"""

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill
import yaml
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Papermill's metadata that readers and tests use; dates and folders would change with every build.
KEPT_METADATA = ("duration", "exception", "version")


def sources() -> list[str]:
    """Names of the notebooks, in reading order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))


def source(name: str) -> NotebookNode:
    """The notebook of a source, not run.

    Raises:
        ValueError: There is no such source.
    """
    if name not in sources():
        raise ValueError(f"There is no tutorial {name!r}. Tutorials: {', '.join(sources())}.")
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = NotebookNode(
            {key: value for key, value in cell.metadata.items() if key == "tags"}
        )
    notebook.metadata = NotebookNode(kernelspec=KERNEL)
    return notebook


def parameters(notebook: NotebookNode) -> set[str]:
    """Names that the cell tagged `parameters` sets."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    names = (node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def small_parameters(name: str, output: Path) -> dict[str, Any]:
    """Parameters of the small setting; its files are written next to its notebook.

    Raises:
        ValueError: small.yaml names something that the source does not set.
    """
    values = yaml.safe_load((FOLDER / "small.yaml").read_text(encoding="utf-8")).get(name) or {}
    unknown = sorted(set(values) - parameters(source(name)))
    if unknown:
        raise ValueError(f"small.yaml sets {unknown}, which are not parameters of {name}.py.")
    return {**values, "folder": str(output / name)}


def build(name: str, output: Path, changes: Mapping[str, Any]) -> Path:
    """Run a source with some parameters changed, and write the notebook to a folder if the run succeeds."""
    notebook = papermill.execute_notebook(
        source(name),
        None,
        parameters=dict(changes),
        kernel_name=KERNEL["name"],
        progress_bar=False,
        cwd=str(ROOT),
        # The kernel warns at each start that traffic over localhost is not encrypted.
        extra_arguments=["--log-level=ERROR"],
    )
    tidy(notebook)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    """A notebook's cells, without outputs."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def stale(names: Sequence[str], folder: Path = FOLDER) -> list[str]:
    """The names whose notebook is missing or differs from its source."""
    return [
        name
        for name in names
        if not (path := folder / f"{name}.ipynb").is_file()
        or cells(nbformat.read(path, as_version=4)) != cells(source(name))
    ]


def tidy(notebook: NotebookNode) -> None:
    """Remove from a run notebook all that would differ on another machine or is of no use to its reader."""
    about = notebook.metadata.papermill
    notebook.metadata = NotebookNode(
        kernelspec=KERNEL,
        language_info=NotebookNode(name="python"),
        papermill=NotebookNode({key: about[key] for key in KEPT_METADATA}),
    )
    notebook.metadata.papermill.duration = round(about.duration)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = list(joined_streams(cell.outputs))
            for result in cell.outputs:
                without_folders(result)


def joined_streams(outputs: Sequence[NotebookNode]) -> Iterator[NotebookNode]:
    """The printed output in one piece, without standard error (progress and logs)."""
    last = None
    for result in outputs:
        if result.output_type != "stream":
            last = None
        elif result.name == "stderr":
            continue
        elif last is not None:
            last.text += result.text
            continue
        else:
            last = result
        yield result


def without_folders(result: NotebookNode) -> None:
    """Make paths in the output relative to the repository or to home."""
    texts = result if "text" in result else result.get("data", {})
    for key, text in texts.items():
        if key == "text" or key.startswith("text/"):
            text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
            texts[key] = re.sub(re.escape(str(Path.home())) + r"(?=/)", "~", text)


def set_environment() -> None:
    """Environment of the kernel and its commands: this copy of the package, and no progress bars."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["TQDM_DISABLE"] = "1"
    # The kernel's warning about the debugger.
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="sources; none builds all")
    parser.add_argument("--small", action="store_true", help="with the values of small.yaml")
    parser.add_argument("--output", type=Path, help="folder for the notebooks")
    parser.add_argument("--check", action="store_true", help="run nothing, compare the cells")
    options = parser.parse_args(args)
    output = options.output or (ROOT / "runs" / "tutorials-small" if options.small else FOLDER)
    if options.small and output.resolve() == FOLDER:
        parser.error("--small would replace the committed notebooks. Name another --output.")
    set_environment()
    try:
        names = [name.removesuffix(".py") for name in options.names] or sources()
        todo = {
            name: small_parameters(name, output.resolve()) if options.small else {}
            for name in names
            if source(name)
        }
    except ValueError as error:
        parser.error(str(error))
    if options.check:
        old = stale(list(todo), output)
        if old:
            print(
                f"Notebooks that differ from their source: {', '.join(old)}. Run python tutorials/build.py."
            )
        return 1 if old else 0
    for name, changes in todo.items():
        path = build(name, output, changes)
        seconds = nbformat.read(path, as_version=4).metadata.papermill.duration
        print(f"{path}: {seconds} s, {path.stat().st_size / 1e6:.2f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
