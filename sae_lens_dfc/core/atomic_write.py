"""Writes files and folders atomically."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sae_lens_dfc.core.terminal import said_by

UNFINISHED = ".unfinished"


def _check_place(path: Path) -> None:
    """Refuse a path at which nothing can be created, because its parent is a file or not
    writable."""
    ancestor = next(parent for parent in path.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ValueError(f"Output {path} cannot be made in {ancestor}. Name another.")


def check_file(path: Path) -> None:
    """Refuse a path that exists but is not a file, such as a folder or a device, or at which no
    file can be created.

    Raises:
        ValueError: The path is one of these.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file and cannot be replaced by one. Name another.")
    _check_place(path.resolve())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` if the block succeeds and is deleted if it
    fails."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
    ) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        with os_errors():
            yield fresh
        with_usual_modes(fresh)
        old = Path(temporary) / "old"
        try:
            if path.exists():
                path.rename(old)
            fresh.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def with_usual_modes(folder: Path) -> None:
    """Set the mode of all files in a new folder to the default of the umask, because safetensors
    makes its files readable by the owner only."""
    # Taken from the folder, because the umask cannot be read without setting it for all threads.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def os_errors() -> Iterator[None]:
    """Re-raise safetensors' own error, such as for a full disk, as an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(said_by(error)) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` if the block succeeds, so that readers see all of
    it or nothing.

    Raises:
        ValueError: The path is not a file, such as a folder or `/dev/null`.
    """
    path = Path(path)
    check_file(path)
    temporary = path.with_name(f".{path.name}.new")
    # Left by a killed process, or a link placed by an attacker to redirect the write.
    temporary.unlink(missing_ok=True)
    try:
        with os_errors():
            yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
