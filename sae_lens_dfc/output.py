"""Writing results so that a folder holds all of them or none."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from safetensors import SafetensorError

from sae_lens_dfc.terminal import printable

UNFINISHED = ".unfinished"


def say(text: str) -> None:
    """A line for whoever ran a command: what it answers goes to standard output, all else to standard error.

    Raises:
        OSError: Nobody reads it, or there is no room for it.
    """
    sys.stdout.write(printable(text) + "\n")
    # Left to Python's end, an error would have its own message and exit status.
    sys.stdout.flush()


def check_output(
    path: str | Path,
    overwrite: bool,
    what: str = "run",
    marks: Sequence[str] = (RUNNER_CFG_FILENAME, SAE_CFG_FILENAME),
) -> None:
    """Refuse, before any work, a folder that cannot be written or holds something that should stay.

    Args:
        path: The folder.
        overwrite: Whether it may hold one.
        what: What it may hold.
        marks: Files of which a folder that holds one has at least one.

    Raises:
        ValueError: It holds one and `overwrite` is false, holds anything else, or cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"Output {path} is no folder. Name one.")
    if path == Path.cwd() or path.is_mount():
        raise ValueError(
            f"Output folder {path} cannot be replaced as a whole. Name a folder in it."
        )
    ancestor = next(parent for parent in path.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ValueError(f"Output folder {path} cannot be made in {ancestor}. Name another.")
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
    """Whether a folder holds a run, or what else has one of these files."""
    return any((Path(path) / mark).is_file() for mark in marks)


def check_file(path: Path) -> None:
    """Refuse to put a file where something else is, such as a folder or a device.

    Raises:
        ValueError: There is.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file and cannot be replaced by one. Name another.")


@contextmanager
def claimed(
    path: str | Path,
    overwrite: bool,
    what: str = "run",
    marks: Sequence[str] = (RUNNER_CFG_FILENAME, SAE_CFG_FILENAME),
) -> Iterator[None]:
    """`check_output` of a folder, which is then held against other processes while this is open.

    Raises:
        ValueError: As `check_output`, or another process holds it.
    """
    check_output(path, overwrite, what, marks)
    with sole_user(path):
        # While this one came here, another may have ended with it.
        check_output(path, overwrite, what, marks)
        yield


@contextmanager
def sole_user(path: str | Path) -> Iterator[None]:
    """Hold a file or folder against other processes, and tidy up after those that were killed at work on it.

    A hidden file beside `path` marks it. The operating system lets go of it when this process ends, however it does.

    Raises:
        ValueError: Another process holds it.
    """
    path = Path(path).resolve()
    mark = path.with_name(f".{path.name}.lock")
    with _made(path.parent), ExitStack() as stack:
        try:
            stack.enter_context(FileLock(mark, timeout=0))
        except Timeout:
            raise ValueError(
                f"Another process is at work on {path}. Wait until it has ended, or name another."
            ) from None
        # While it is still held: whoever has opened it meanwhile sees that it is gone, and asks anew.
        stack.callback(mark.unlink, missing_ok=True)
        _tidy(path)
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, and those above it; those that were not there and hold nothing afterwards are gone again."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in absent:
                path.rmdir()


def _tidy(path: Path) -> None:
    """Remove what a killed process left of `all_or_nothing`; what it was about to put in place is put there."""
    of_path = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(UNFINISHED)}")
    for left in path.parent.iterdir():
        if of_path.fullmatch(left.name):
            if not path.exists() and (left / "old").exists() and (left / "new").exists():
                (left / "new").rename(path)
            shutil.rmtree(left)


@contextmanager
def all_or_nothing(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes `path`'s place when the block ends well, and vanishes when it does not."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
    ) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        with os_errors():
            yield fresh
        old = Path(temporary) / "old"
        try:
            if path.exists():
                path.rename(old)
            fresh.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise


@contextmanager
def os_errors() -> Iterator[None]:
    """safetensors has an error of its own for a full disk; the command line knows Python's."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place when the block ends well: whoever looks sees all of it or none.

    Raises:
        ValueError: There is something that is no file, such as a folder or `/dev/null`.
    """
    path = Path(path)
    check_file(path)
    temporary = path.with_name(f".{path.name}.new")
    # What a killed process left; or a link that a stranger put there, to be written through.
    temporary.unlink(missing_ok=True)
    try:
        with os_errors():
            yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
