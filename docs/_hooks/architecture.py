"""The lists of docs/architecture.md, made from the package's docstrings: run this file after a file
came, went or changed its first sentence."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sae_lens_dfc"
PAGE = ROOT / "docs" / "architecture.md"
LISTS = re.compile(r"(?<=<!-- files -->\n\n).*?(?=\n\n<!-- end -->)", flags=re.DOTALL)
ROOMS = (
    *("core", "models", "data", "organisms", "stats", "crosscoders", "metrics", "training"),
    *("analysis", "cli"),
)


def with_files(page: str) -> str:
    """The page with the package's files as they are now."""
    parts = ["## The package itself", _table(PACKAGE)]
    for folder in [PACKAGE / room for room in ROOMS]:
        parts += _section(folder)
    return LISTS.sub(lambda _: "\n\n".join(parts), page)


def _section(folder: Path) -> list[str]:
    depth = len(folder.relative_to(PACKAGE).parts)
    heading = f"{'#' * (depth + 1)} `{folder.relative_to(PACKAGE)}/`"
    below = (path.parent for path in sorted(folder.glob("*/__init__.py")))
    files = [_table(folder)] if len(list(folder.glob("*.py"))) > 1 else []
    return [
        heading,
        _docstring(folder / "__init__.py"),
        *files,
        *(text for one in below for text in _section(one)),
    ]


def _table(folder: Path) -> str:
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    rows = [f"| `{path.name}` | {_docstring(path)} |" for path in files]
    return "\n".join(["| file | what it does |", "|---|---|", *rows])


def _docstring(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_files(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
