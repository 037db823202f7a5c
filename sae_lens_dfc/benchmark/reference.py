"""The public DFC code's training step, from a checkout of github.com/superkaiba/dfc_learning.

Its code is run from that folder. Of what it imports only part is needed for a step, so whatever is not
installed is replaced by something empty while it is imported.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from sae_lens_dfc.texts import first_line

PACKAGE = "dictionary_learning"
TRAINER_FILE = f"{PACKAGE}/trainers/crosscoder.py"
CROSSCODER_FILE = f"{PACKAGE}/dictionary.py"
# Its trainer learns the threshold after its first 1,000 steps: a step of a long training is one after those.
FIRST_STEP = 2_000
TOTAL_STEPS = 100_000


class Reference(NamedTuple):
    """The two classes of a checkout that make up a training."""

    trainer: type[Any]
    crosscoder: type[Any]


def load_reference(folder: Path) -> Reference:
    """Import the classes from a checkout, and leave `sys.path` and `sys.modules` as they were.

    Args:
        folder: The checkout; its code is run.

    Raises:
        ValueError: It is no such checkout, or its code cannot be imported.
    """
    for name in (TRAINER_FILE, CROSSCODER_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a checkout of github.com/superkaiba/dfc_learning: it has no {name}."
            )
    try:
        with _importable(folder):
            trainers = importlib.import_module(_module(TRAINER_FILE))
            crosscoders = importlib.import_module(_module(CROSSCODER_FILE))
            return Reference(
                trainers.BatchTopKCrossCoderTrainer,
                crosscoders.DedicatedFeatureBatchTopKCrossCoder,
            )
    # Whatever its code raises at import, it is the folder that was wrong.
    except Exception as error:
        raise ValueError(
            f"The reference in {folder} could not be imported: {type(error).__name__}: {first_line(error)}"
        ) from error


def reference_step(
    reference: Reference,
    d_model: int,
    d_sae: int,
    k: int,
    exclusive: tuple[float, float],
    device: str,
) -> Callable[[Tensor], Any]:
    """A training of the reference, as a function that makes its next step.

    Args:
        reference: From `load_reference`.
        d_model: Width of both models.
        d_sae: Number of latents.
        k: Latents active on a pair.
        exclusive: Shares of the latents that only A, and only B, may use.
        device: Where it trains.

    Returns:
        A function of a batch (pairs, 2, d_model), which it may change.
    """
    trainer = reference.trainer(
        steps=TOTAL_STEPS,
        activation_dim=d_model,
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="none",
        dict_class=reference.crosscoder,
        dict_class_kwargs={
            "model_a_exclusive_pct": exclusive[0],
            "model_b_exclusive_pct": exclusive[1],
        },
        device=device,
    )
    numbers = count(FIRST_STEP)
    return lambda pairs: trainer.update(next(numbers), pairs)


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Python finds the folder's package, and stand-ins for what that imports and is not installed."""
    # It looks at which optional packages there are when it is imported first, and must not see stand-ins.
    importlib.import_module("datasets")
    stand_ins = _stand_ins(_not_installed(_imports(folder / PACKAGE)))
    others = _loaded_package()
    for name in others:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [*stand_ins, *_loaded_package()]:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def _loaded_package() -> dict[str, ModuleType]:
    return {name: m for name, m in sys.modules.items() if name.partition(".")[0] == PACKAGE}


def _imports(package: Path) -> set[str]:
    """Every module that the package's files name in an import, its own apart."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module)
    return {name for name in names if name.partition(".")[0] != PACKAGE}


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
