"""Records the provenance of results: commit, machine and package versions."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae_lens_dfc.models.number_formats import fast_dtype

ROOT = Path(__file__).parent.parent
CODE = ("sae_lens_dfc", "benchmarks/*.py")
"""What produces results; pathspecs of git."""
CPU_INFO = Path("/proc/cpuinfo")


def provenance(*others: str) -> dict[str, Any]:
    """Commit, machine and versions; the commit is none if this is not a repository.

    Args:
        others: Additional distributions to record, by name.
    """
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a run",
        "cpu": cpu(),
        "formats": formats(),
        "versions": {
            name: version(name) for name in ("sae-lens-dfc", "sae-lens", "torch", *others)
        },
    }


def cpu() -> str | None:
    """The processor's name; none if the system does not provide it."""
    if not CPU_INFO.exists():
        return None
    names = [line for line in CPU_INFO.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else None


def formats() -> str:
    """The processor's vector instructions used by torch, and bfloat16 if it is fast."""
    fast = " and bfloat16" if fast_dtype("cpu") == "bfloat16" else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{fast}"


def commit(folder: Path = ROOT, code: Sequence[str] = CODE) -> str | None:
    """The commit of a folder, and whether its code has uncommitted changes; none outside a
    repository."""
    git = shutil.which("git")
    if git is None:
        return None
    head = _git(git, folder, "rev-parse", "HEAD")
    if head.returncode != 0:
        return None
    changed = _git(git, folder, "diff", "--quiet", "HEAD", "--", *code).returncode != 0
    return head.stdout.strip() + (", changed" if changed else "")


def _git(git: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([git, *args], capture_output=True, text=True, cwd=folder)
