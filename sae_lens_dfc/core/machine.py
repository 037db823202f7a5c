"""Measures the memory, disk space and processor load of this machine."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

STATM = Path("/proc/self/statm")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
UNIT_OF_PEAK = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`, in bytes."""


def resident_memory() -> int:
    """Resident memory of this process in bytes; its peak if the system does not report it."""
    if not STATM.exists():
        return peak_memory()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def memory_of(device: torch.device) -> int | None:
    """Memory in bytes that a GPU has available for this process, or that the machine has; None if
    the system does not report it.

    >>> memory_of(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if not hasattr(os, "sysconf"):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def free_disk(path: Path) -> int:
    """Free disk space in bytes at a path, which need not exist."""
    here = next(place for place in (path.resolve(), *path.resolve().parents) if place.exists())
    return shutil.disk_usage(here).free


def load() -> float:
    """Load average of the last minute per core; 0 if the system does not report it."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    return os.getloadavg()[0] / (os.cpu_count() or 1)
