"""Where a figure comes from: commit, machine and versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent.parent
CPU_INFO = Path("/proc/cpuinfo")


def provenance(*others: str) -> dict[str, Any]:
    """Commit, machine and versions; the commit is none where the package is not in a repository.

    Args:
        others: Distributions that took part besides, by name.
    """
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a run",
        "cpu": cpu(),
        "versions": {
            name: version(name) for name in ("sae-lens-dfc", "sae-lens", "torch", *others)
        },
    }


def cpu() -> str | None:
    """The processor's name; none where the system does not tell it."""
    if not CPU_INFO.exists():
        return None
    names = [line for line in CPU_INFO.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else None


def commit(folder: Path = PACKAGE) -> str | None:
    """The commit of a folder, and whether it was changed since; none outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    head = _git(git, folder, "rev-parse", "HEAD")
    if head.returncode != 0:
        return None
    changed = _git(git, folder, "diff", "--quiet", "HEAD", "--", ".").returncode != 0
    return head.stdout.strip() + (", changed" if changed else "")


def _git(git: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([git, *args], capture_output=True, text=True, cwd=folder)
