"""The command line in processes that can be killed, starved and interrupted. They are forked from
one that has all imported, so each starts at once."""

import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sae_lens_dfc.cli.main import COMMANDS, main

START_METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(START_METHOD)
# What `evaluate`, `report` and `latents` import when they run is among what `screen` imports.
CONTEXT.set_forkserver_preload(["sae_lens_dfc.cli.parser", *(m for m, _ in COMMANDS.values())])
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}

Prepare = Callable[[], None]
"""What is done in the child before the command."""


class Ended(NamedTuple):
    status: int
    """The exit status; of what a signal killed, its number with a minus."""
    errors: str
    """Standard error."""
    seconds: float

    @property
    def error(self) -> str:
        """The one line of error.

        Raises:
            AssertionError: There are several, or the text of an exception that nobody expected.
        """
        lines = [line for line in self.errors.splitlines() if "sae-lens-dfc: " in line]
        assert len(lines) == 1 and "Traceback" not in self.errors, self.errors
        return lines[0]


class Child:
    """A command that runs in a process of its own.

    Args:
        arguments: Of `sae-lens-dfc`.
        errors: File that takes its standard error.
        prepare: Called in the child first; a function of a module, or a partial of one.
    """

    def __init__(self, arguments: Sequence[str], errors: Path, prepare: Prepare | None = None):
        self.errors = errors
        self.began = time.monotonic()
        self.process = CONTEXT.Process(target=_run, args=(list(arguments), str(errors), prepare))
        self.process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is still there."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait_for(self, path: Path) -> None:
        """Wait until it has made this file, or ended."""
        while not path.exists() and self.process.is_alive():
            time.sleep(0.0001)

    def ended(self, timeout: float = 120) -> Ended:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            # It writes where each of its threads is.
            self.kill(signal.SIGUSR1)
            self.process.join(1)
            self.kill()
            raise AssertionError(f"still running:\n{self.errors.read_text()}")
        return Ended(self.process.exitcode, self.errors.read_text(), time.monotonic() - self.began)


def _run(arguments: list[str], errors: str, prepare: Prepare | None) -> None:
    to = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Tests started in the background ignore Ctrl-C, and those under nohup a lost terminal; so do
    # their child processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=2)
    if prepare is not None:
        prepare()
    sys.exit(main(arguments))


def run(
    arguments: Sequence[str], folder: Path, prepare: Prepare | None = None, timeout: float = 120
) -> Ended:
    """Run a command to its end."""
    return Child(arguments, folder / "errors.txt", prepare).ended(timeout)


# --- what befalls a child ---


def die_at_file_operation(n: int, folder: str) -> None:
    """Have this process killed when it is about to open, rename, make or remove its n-th file or
    folder below `folder`."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def do_when_touched(pattern: str, n: int, do: Prepare) -> None:
    """Have this process do something once, just before it opens, renames, makes or removes the n-th
    path of this pattern.

    From outside it would be a race: some of what is to be met lasts a millisecond.
    """
    seen: set[str] = set()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        # What is done may touch files too.
        if event in FILE_EVENTS and len(seen) < n and fnmatch(str(arguments[0]), pattern):
            seen.add(str(arguments[0]))
            if len(seen) == n:
                do()

    sys.addaudithook(look)


def do_when_called(name: str, do: Prepare) -> None:
    """Have this process do something before each call of a function, named as `module:function`."""
    module, function = name.split(":")
    real = getattr(import_module(module), function)

    def called(*args: Any, **kwargs: Any) -> Any:
        do()
        return real(*args, **kwargs)

    setattr(import_module(module), function, called)


def fill(filler: Path) -> None:
    """Take all the room that there is, with one file."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def ask_to_end(asked: Path) -> None:
    """Send this process SIGTERM, and write down when."""
    if not asked.exists():
        asked.write_text(str(time.monotonic()))
        signal.raise_signal(signal.SIGTERM)


def stall_while(there: Path) -> None:
    """Do nothing as long as this file is there."""
    while there.exists():
        time.sleep(0.01)


def write_file_operations(path: str, folder: str) -> None:
    """Have this process count its file operations below `folder`: so many bytes are in the file
    `path` then."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            os.write(file, b".")

    sys.addaudithook(count)


def take_memory_away(n_bytes: int) -> None:
    """Allow this process so much memory more than it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + n_bytes, now + n_bytes))


def have_the_clock_jump(seed: int, looks: Path) -> None:
    """Have Python's wall clock jump by up to a year, either way, whenever it is looked at; a byte
    in `looks` for each time.

    `time.time` and `time.time_ns`, in every module that holds one of them; not the clock that C and
    Rust ask for themselves.
    """
    draws, true_time = random.Random(seed), time.time
    file = os.open(looks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def jumping() -> float:
        os.write(file, b".")
        return true_time() + draws.uniform(-1, 1) * 3e7

    clocks = {id(time.time): jumping, id(time.time_ns): lambda: int(1e9 * jumping())}
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if id(value) in clocks:
                setattr(module, name, clocks[id(value)])


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory; where none can be mounted, as in a container of few
    rights, the test is skipped."""
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {folder}") != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        yield folder
    finally:
        assert os.system(f"umount -l {folder}") == 0


def remount(folder: Path, options: str) -> None:
    """Change the size of a `small_disk`, or whether it can be written."""
    assert os.system(f"mount -o remount,{options} {folder}") == 0


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, but for what differs between two equal jobs: the marks of locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }
