"""Import other people's packages for a part of them: what that part does not need may be missing."""

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
    """While this is open Python finds a package of a folder, and stand-ins for what it imports and is not installed.

    Of a stand-in every attribute is an empty class. Afterwards `sys.path` and `sys.modules` are as they were.

    Args:
        folder: Holds the package; its code is run by whoever imports it.
        package: Its name.
    """
    # It looks at which optional packages there are when it is imported first, and must not see stand-ins.
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
    """Every module that the package's files name in an import, its own apart."""
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
    """A module for each name and each of its parents, of which every attribute is an empty class."""
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
        # Python itself asks modules for such names, and takes what it gets at its word.
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {})

    vars(module)["__getattr__"] = attribute
    return module
