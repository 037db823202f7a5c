"""Which test files have to do with a change: `python -m tests.touched [SINCE]` prints them.

A test file is named if it changed itself, or if it, or a helper of the tests that it imports,
imports a module of the package that changed. `SINCE` is a commit; left out, what changed on the
last day of the history counts. A change of what all tests share (`conftest.py`, `pyproject.toml`)
names no file: the fast tests show whether that works.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
READ_BY = {
    "docs/": "test_docs",
    "tutorials/": "test_tutorials",
    "benchmarks/": "benchmarks/tables/test_results",
}
"""Folders whose files no test imports, and the test files that run or check them."""


def touched(changed: set[str], root: Path = ROOT) -> list[str]:
    """Test files that have to do with these files, the changed ones first.

    Args:
        changed: Paths below `root`.
        root: A checkout.
    """
    files = sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("*.py"))
    imports = {file: set(_imports(root / file)) for file in files}
    modules = {_module(file) for file in changed if file.endswith(".py")}
    helpers = {_module(f) for f in files if not _is_test(f) and imports[f] & modules}
    readers = {
        f"tests/{test}.py"
        for folder, test in READ_BY.items()
        if any(c.startswith(folder) for c in changed)
    }
    direct = changed | readers
    tests = [f for f in files if _is_test(f) and (f in direct or imports[f] & (modules | helpers))]
    return sorted(tests, key=lambda file: file not in changed)


def _is_test(file: str) -> bool:
    return Path(file).name.startswith("test_")


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(path: Path) -> Iterator[str]:
    """Modules of the package and of the tests that a file imports by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def changed_files(since: str | None) -> set[str]:
    """Files of this checkout that changed since a commit, in commits and beside them; on the last
    day, where none is named."""
    base = since or _before_last_day()
    return {*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")}


def _before_last_day() -> str:
    """The last commit that is a day older than HEAD, else the first of all."""
    [now] = _git("log", "-1", "--format=%ct")
    older = _git("log", "-1", f"--before={int(now) - 86_400}", "--format=%H")
    return (older or _git("rev-list", "--max-parents=0", "HEAD"))[0]


def _git(*args: str) -> list[str]:
    run = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.split()


def main(args: Sequence[str]) -> None:
    """Print the test files that have to do with what changed since `args[0]`."""
    try:
        changed = changed_files(next(iter(args), None))
    except (OSError, subprocess.CalledProcessError) as error:
        # An unpacked archive, or a clone that git will not read.
        print(f"No slow test is chosen, since git tells no history: {error}", file=sys.stderr)  # noqa: T201
        return
    print(*touched(changed))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
