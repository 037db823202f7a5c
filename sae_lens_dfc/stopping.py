"""Ctrl-C and SIGTERM as a wish that long work fulfils between two of its steps, where it can be gone on with."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens_dfc import ranks

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# Several ranks stop at one step, and to ask the others at every step would have a GPU waited for.
STEPS_BETWEEN_AGREEMENTS = 16


class Stopped(KeyboardInterrupt):  # noqa: N818
    """Work ended early because this process was asked to end.

    Args:
        number: The signal that asked.
        message: What is kept of the work, and how to go on with it.
    """

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.number = number


def stop_now(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """A handler of signals for work that can be interrupted anywhere.

    Raises:
        Stopped: Always.
    """
    raise Stopped(number)


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Give `handler` the signals that ask a process to end, while this is open.

    Those that are ignored, as under nohup, and those that a program around Python holds stay so. Outside the main thread, to which alone Python gives signals, it does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, was in before.items() if was not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


class Stop:
    """Whether this process was asked to end, for work that says itself where it can be interrupted.

    A first signal is remembered until the next place where work waits; there, or when it comes while work waits, it
    raises `Stopped`. Another Ctrl-C, a second later or more, interrupts at once. Other signals that follow do not: whoever
    ends a process sends several (torchrun passes on what its processes have had from the terminal, systemd adds SIGHUP).

    >>> stop = Stop()
    >>> with stop.on_signals():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     print("this step is done")
    ...     try:
    ...         with stop.waiting():
    ...             print("no other is begun")
    ...     except Stopped as stopped:
    ...         print(signal.Signals(stopped.number).name)
    this step is done
    SIGTERM
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal; 0 while there was none."""
        self._asked = 0.0
        self._is_waiting = False
        self._n_waits = 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals while this is open."""
        with signals_to(self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._asked = number, time.monotonic()
        is_insisted_on = number == signal.SIGINT and time.monotonic() - self._asked > 1
        if is_insisted_on or (self._is_waiting and ranks.world_size() == 1):
            stop_now(number, frame)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A place where work can be interrupted: nothing that happens in it is counted as done.

        Raises:
            Stopped: The process was asked to end.
        """
        self._is_waiting = True
        try:
            if self._is_agreed():
                raise Stopped(self.number or signal.SIGTERM)
            yield
        finally:
            self._is_waiting = False

    def _is_agreed(self) -> bool:
        if ranks.world_size() == 1:
            return self.number != 0
        self._n_waits += 1
        if self._n_waits % STEPS_BETWEEN_AGREEMENTS:
            return False
        return bool(ranks.anyone(self.number != 0))
