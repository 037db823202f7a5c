"""Measures the peak memory of a function call."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sae_lens_dfc.core.machine import return_freed_memory

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# Written to clear_refs, this makes the kernel reset the process's peak memory.
RESET_PEAK = "5"

T = TypeVar("T")


def with_peak_memory(do: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Call `do`, and return its result and the peak growth of memory in use, in bytes.

    Args:
        do: The work.
        device: On a GPU, memory allocated by torch is measured; elsewhere, the process's resident
            memory.

    Returns:
        The result and the memory; the memory is none if the system does not report it (/proc
        missing or not writable).
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
    # The allocator keeps freed memory, whose reuse by `do` would not appear as growth.
    return_freed_memory()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field that /proc reports in kB, in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
