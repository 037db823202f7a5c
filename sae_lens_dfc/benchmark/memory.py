"""How much memory a piece of work takes at its most."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# What the kernel takes as: forget how much memory this process had at its most.
RESET_PEAK = "5"

T = TypeVar("T")


def with_peak_memory(do: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `do` returns, and by how many bytes the memory in use grew at its most meanwhile.

    Args:
        do: The work.
        device: On a GPU, what torch has allocated there is counted; elsewhere, the process's resident memory.

    Returns:
        The result, and none for the memory where the system does not say (no /proc, or a closed one).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = do()
        return result, torch.cuda.max_memory_allocated(device) - before
    before = _resident_with_peak_reset()
    result = do()
    return result, None if before is None else _status("VmHWM") - before


def _resident_with_peak_reset() -> int | None:
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    _give_back_what_is_free()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _give_back_what_is_free() -> None:
    # The allocator keeps what was freed; the work would take it again and none would be seen to grow.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """Bytes of a field that /proc gives in kB."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
