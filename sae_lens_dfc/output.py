"""Writing results so that a folder holds all of them or none."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from safetensors import SafetensorError

from sae_lens_dfc.terminal import printable


def say(text: str) -> None:
    """A line for whoever ran a command: what it answers goes to standard output, all else to standard error."""
    sys.stdout.write(printable(text) + "\n")


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


@contextmanager
def os_errors() -> Iterator[None]:
    """safetensors has an error of its own for a full disk; the command line knows Python's."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place when the block ends well: whoever looks sees all of it or none."""
    path = Path(path)
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
