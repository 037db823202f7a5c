"""Checks and locks output folders, and removes leftovers of killed processes."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_lens_dfc.core.atomic_write import UNFINISHED, _check_place


def check_output(
    path: str | Path,
    overwrite: bool,
    what: str = "run",
    marks: Sequence[str] = (RUNNER_CFG_FILENAME, SAE_CFG_FILENAME),
) -> None:
    """Refuse, before any work, an output folder that cannot be written or whose contents must not
    be overwritten.

    Args:
        path: The folder.
        overwrite: Whether it may already hold a result.
        what: Name of the kind of result, for messages.
        marks: Files of which a folder with such a result has at least one.

    Raises:
        ValueError: It holds a result and `overwrite` is false, holds anything else, or cannot be
            written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"Output {path} is no folder. Name one.")
    if path == Path.cwd() or path.is_mount():
        raise ValueError(
            f"Output folder {path} cannot be replaced as a whole. Name a folder in it."
        )
    _check_place(path)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not is_made(path, marks):
        raise ValueError(f"Output folder {path} holds files that are not a {what}. Name another.")
    if not overwrite:
        raise ValueError(
            f"Output folder {path} already holds a {what}. Pass --overwrite or name another."
        )


def is_made(
    path: str | Path, marks: Sequence[str] = (RUNNER_CFG_FILENAME, SAE_CFG_FILENAME)
) -> bool:
    """Whether a folder holds a result, recognized by any of the `marks`."""
    return any((Path(path) / mark).is_file() for mark in marks)


@contextmanager
def locked_output(
    path: str | Path,
    overwrite: bool,
    what: str = "run",
    marks: Sequence[str] = (RUNNER_CFG_FILENAME, SAE_CFG_FILENAME),
) -> Iterator[None]:
    """Check a folder as `check_output` does, and lock it against other processes inside the block.

    Raises:
        ValueError: As for `check_output`, or another process holds the lock.
    """
    check_output(path, overwrite, what, marks)
    with file_lock(path):
        # Another process may have written to it before this one got the lock.
        check_output(path, overwrite, what, marks)
        yield


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Lock a file or folder against other processes, and remove leftovers of processes killed while
    writing it.

    The lock is on a hidden file beside `path`. The operating system releases it when this process
    ends for any reason.

    Raises:
        ValueError: Another process holds the lock.
    """
    path = Path(path).resolve()
    _check_place(path)
    mark = path.with_name(f".{path.name}.lock")
    with _made(path.parent), ExitStack() as stack:
        try:
            stack.enter_context(FileLock(mark, timeout=0))
        except Timeout:
            raise ValueError(
                f"Another process is at work on {path}. Wait until it has ended, or name another."
            ) from None
        # Unlinked while still locked: a process that opened it meanwhile notices and tries again.
        stack.callback(mark.unlink, missing_ok=True)
        _tidy(path)
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents, and afterwards remove those created here that are empty."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in absent:
                path.rmdir()


def _tidy(path: Path) -> None:
    """Remove what a killed process left of `atomic_folder`; a finished folder that it was about to
    move into place is moved there."""
    of_path = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(UNFINISHED)}")
    for left in path.parent.iterdir():
        if of_path.fullmatch(left.name):
            if not path.exists() and (left / "old").exists() and (left / "new").exists():
                (left / "new").rename(path)
            shutil.rmtree(left)
