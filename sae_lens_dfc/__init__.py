"""Crosscoders between two language models, as SAELens training targets."""

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# transformers reads it when it is imported. Left out, it downloads compiled kernels and runs them
# where the package `kernels` is there.
os.environ.setdefault("USE_HUB_KERNELS", "NO")


def _is_the_command_line() -> bool:
    """Whether this process is the command `sae-lens-dfc`, or a script that sets
    `SAE_LENS_DFC_IS_PUT_OFF`, which are to answer before all of this is imported.

    A process that it spawns has its arguments too, and runs its script as `__mp_main__`, beside a
    `__main__` of its own.
    """
    main = sys.modules.get("__main__")
    is_spawned = sys.modules.get("__mp_main__", main) is not main
    name = Path(next(iter(sys.argv), "")).stem
    is_asked = name == "sae-lens-dfc" or (name == "-m" and _is_the_module())
    return not is_spawned and (is_asked or hasattr(main, "SAE_LENS_DFC_IS_PUT_OFF"))


def _is_the_module() -> bool:
    """Whether Python was asked to run this package, by `-m`: while it looks for it, the arguments
    begin with that alone."""
    [*_, asked] = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1] or [""]
    return re.fullmatch(r"(-\w*m)?sae_lens_dfc(\.__main__)?", asked) is not None


if TYPE_CHECKING or not _is_the_command_line():
    from sae_lens_dfc.api import *
    from sae_lens_dfc.api import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Import what a command uses when it uses it."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"Module {__name__!r} has no attribute {name!r}.")
        return getattr(import_module("sae_lens_dfc.api"), name)
