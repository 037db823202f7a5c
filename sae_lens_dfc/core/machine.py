"""Measures the memory, disk space and processor load of this machine."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
UNIT_OF_PEAK = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`, in bytes."""


def resident_memory() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Peak memory of this process in bytes; 0 if the system does not report it."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_OF_PEAK


def return_freed_memory() -> None:
    """Return freed memory to the system on glibc; other C libraries do this by themselves.

    glibc keeps it for the thread that allocated it, and transformers loads weights in short-lived
    threads.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def memory_of(device: torch.device) -> int:
    """Memory in bytes that a GPU has available for this process, or that the machine has.

    >>> memory_of(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    physical = psutil.virtual_memory().total
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def free_disk(path: Path) -> int:
    """Free disk space in bytes at a path, which need not exist."""
    here = next(place for place in (path.resolve(), *path.resolve().parents) if place.exists())
    return shutil.disk_usage(here).free


def load_per_core() -> float:
    """Load average of the last minute per core."""
    return psutil.getloadavg()[0] / (os.cpu_count() or 1)
