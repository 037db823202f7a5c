"""Writing results so that a folder holds all of them or none."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME


def check_output(path: str | Path, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot be written or holds something that should stay.

    Raises:
        ValueError: It holds a run and `overwrite` is false, holds anything else, or cannot be written.
    """
    path = Path(path).resolve()
    if path.is_file():
        raise ValueError(f"Output {path} is a file. Name a folder.")
    if path == Path.cwd() or path.is_mount():
        raise ValueError(
            f"Output folder {path} cannot be replaced as a whole. Name a folder in it."
        )
    ancestor = next(parent for parent in path.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ValueError(f"Output folder {path} cannot be made in {ancestor}. Name another.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / RUNNER_CFG_FILENAME).is_file() and not (path / SAE_CFG_FILENAME).is_file():
        raise ValueError(f"Output folder {path} holds files that are not a run. Name another.")
    if not overwrite:
        raise ValueError(
            f"Output folder {path} already holds a run. Pass --overwrite or name another."
        )


@contextmanager
def all_or_nothing(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes `path`'s place when the block ends well, and vanishes when it does not."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(Path(temporary) / "old")
        fresh.rename(path)
