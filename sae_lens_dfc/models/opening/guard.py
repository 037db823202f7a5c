"""Prevents code from starting processes or running downloaded code while a model is loaded.

TransformerLens installs torchvision with pip when the image processor of a multimodal model does
not load, and runs code from the model's folder when its config.json names certain architectures. An
untrusted config.json can trigger both. The compilers that Triton calls are the only programs let
through.
"""

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from transformers import dynamic_module_utils

PROCESS_EVENTS = frozenset(
    {
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"),
        *("os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
    }
)
"""Python's audit events for starting a process."""
COMPILERS = re.compile(r"([\w.]+-)*(cc|gcc|clang|ldconfig|ptxas)(-[\w.]+)?")
"""Programs with which Triton builds its launcher when an installed kernel library is imported; a
model cannot choose them."""

_this_thread = threading.local()


class NotAllowed(PermissionError):
    """Opening a model tried to do something that is not allowed; it was prevented."""


@contextmanager
def reading_only() -> Iterator[None]:
    """Prevent this thread, inside the block, from starting a process and from running code that was
    downloaded with a model.

    Raises:
        NotAllowed: Code tried to do so. A library that handles this error continues.

    >>> with reading_only():
    ...     os.system("pip install anything")
    Traceback (most recent call last):
    ...
    sae_lens_dfc.models.opening.guard.NotAllowed: Opening a model may not start a process (os.system).
    """
    _watch()
    depth = getattr(_this_thread, "depth", 0)
    _this_thread.depth = depth + 1
    try:
        yield
    finally:
        _this_thread.depth = depth


@cache
def _watch() -> None:
    # An audit hook sees every way to start a process, whatever the library imported it as. It can't
    # be removed.
    sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not getattr(_this_thread, "depth", 0):
        return
    if event in PROCESS_EVENTS and not COMPILERS.fullmatch(program := _program(event, args)):
        raise NotAllowed(f"Opening a model may not start a process ({program or event}).")
    if event == "exec" and _is_downloaded(args[0]):
        raise NotAllowed(
            f"Opening a model may not run code that comes with it ({args[0].co_filename})."
        )


def _program(event: str, args: tuple[Any, ...]) -> str:
    """The program that would be run; empty if the event does not name it."""
    if event == "subprocess.Popen":
        executable, command = args[:2]
        first = command if isinstance(command, str | bytes | os.PathLike) else command[0]
        return os.path.basename(os.fsdecode(executable or first))
    return os.path.basename(os.fsdecode(args[0])) if event == "os.posix_spawn" else ""


def _is_downloaded(code: Any) -> bool:
    """Whether the code is in a download folder of Hugging Face's libraries."""
    if not isinstance(code, CodeType):
        return False
    path = os.path.abspath(code.co_filename)
    downloads = dynamic_module_utils.HF_MODULES_CACHE, HF_HUB_CACHE
    return _is_in(path, downloads) and not _is_in(path, [sys.prefix])  # one may hold the other


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(os.path.join(os.path.abspath(folder), "")) for folder in folders)
