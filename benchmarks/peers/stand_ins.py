"""Imports part of a package whose other dependencies may be missing, by substituting stand-in
modules."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


@contextmanager
def importable(folder: Path, package: str) -> Iterator[None]:
    """Within the block, make a folder's package importable, with stand-ins for its missing imports.

    Every attribute of a stand-in is an empty class. `sys.path` and `sys.modules` are restored
    afterwards.

    Args:
        folder: Folder that holds the package; importing runs its code.
        package: Name of the package.
    """
    # `datasets` checks for optional packages at its first import, and must not see stand-ins.
    importlib.import_module("datasets")
    stand_ins = _stand_ins(_not_installed(_imports(folder / package)))
    others = _loaded(package)
    for name in others:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [*stand_ins, *_loaded(package)]:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def _loaded(package: str) -> dict[str, ModuleType]:
    return {name: m for name, m in sys.modules.items() if name.partition(".")[0] == package}


def _imports(package: Path) -> set[str]:
    """All modules imported by the package's files, except its own."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module)
    return {name for name in names if name.partition(".")[0] != package.name}


def _not_installed(names: set[str]) -> set[str]:
    return {name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None}


def _stand_ins(names: set[str]) -> dict[str, ModuleType]:
    """A stand-in module for each name and each of its parents."""
    modules: dict[str, ModuleType] = {}
    for name in names:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            full = ".".join(parts[:n])
            module = modules.setdefault(full, _stand_in(full))
            if n > 1:
                setattr(modules[".".join(parts[: n - 1])], parts[n - 1], module)
    return modules


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)

    def attribute(wanted: str) -> type[Any]:
        # Python's import system reads dunder attributes, which must not be faked.
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {})

    vars(module)["__getattr__"] = attribute
    return module
