"""Ctrl-C and SIGTERM as a wish that long work fulfils between two of its steps, where it can be gone on with."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_dfc import ranks

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
ALARMS = [getattr(signal, name) for name in ("SIGALRM",) if hasattr(signal, name)]
# Several ranks stop at one step, and to ask the others at every step would have a GPU waited for.
STEPS_BETWEEN_AGREEMENTS = 16
PATIENCE = 2.0
"""Seconds that a place where work waits has to look whether it is to end, before it is interrupted."""

T = TypeVar("T")


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
def signals_to(
    handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int] = SIGNALS
) -> Iterator[None]:
    """Give `handler` the signals that ask a process to end, or others, while this is open.

    Those that are ignored, as under nohup, and those that a program around Python holds stay so. Outside the main thread, to which alone Python gives signals, it does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, was in before.items() if was not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def close_soon(ahead: PrefetchingIterator[Any]) -> None:
    """Stop a thread that makes things ahead, and wait for its end for `PATIENCE` at the most.

    It may be at a download that stalls. It ends by itself after what it is at, or with the process.
    """
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)


class Stop:
    """Whether this process was asked to end, for work that says itself where it can be interrupted.

    A first signal is remembered until the next place where work waits, and raises `Stopped` there, or between two of the
    things that it waits for. Only what does neither for two seconds, such as a download that stalls, is interrupted
    wherever it is: an exception that comes between a lock's being taken and its being held can leave it locked for ever.

    Another Ctrl-C, a second later or more, interrupts at once. Other signals that follow do not: whoever ends a process sends
    several (torchrun passes on what its processes have had from the terminal, systemd adds SIGHUP). One that comes when there
    is nothing left to wait for goes to whoever had the signals before.

    Args:
        together: Whether all ranks end at one step; otherwise each by itself.

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

    def __init__(self, together: bool = True) -> None:
        self._together = together
        self.number = 0
        """The signal; 0 while there was none."""
        self._asked = 0.0
        # With several ranks, whether all know of it.
        self._is_certain = False
        self._is_fulfilled = False
        self._is_waiting = False
        self._n_waits = 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals while this is open."""
        with signals_to(self._on_alarm, ALARMS):
            try:
                with signals_to(self._on_signal):
                    yield
            finally:
                # Not before the signals are somebody else's, as each may set it.
                if ALARMS and self.number:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        if self.number and not self._is_fulfilled:
            signal.raise_signal(self.number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._asked = number, time.monotonic()
            # The others must hear of it before the work ends, and are told at a step that all are at.
            self._is_certain = not self._has_others
            if ALARMS and self._is_certain:
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        elif number == signal.SIGINT and time.monotonic() - self._asked > 1:
            self._is_fulfilled = True
            stop_now(number, frame)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._is_waiting:
            stop_now(self.number, frame)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A place where work can be interrupted: nothing that happens in it is counted as done.

        Raises:
            Stopped: The process was asked to end.
        """
        self._is_waiting = True
        try:
            if self._is_agreed():
                self._is_certain = True
            self._check()
            yield
        except Stopped:
            self._is_fulfilled = True
            raise
        finally:
            self._is_waiting = False

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as long as the work goes on; in any thread.

        Raises:
            Stopped: It ends.
        """
        for item in items:
            self._check()
            yield item

    def _check(self) -> None:
        if self._is_certain:
            # What ends, and puts away what it has, is not to be interrupted once more.
            self._is_waiting = False
            raise Stopped(self.number or signal.SIGTERM)

    @property
    def _has_others(self) -> bool:
        return self._together and ranks.world_size() > 1

    def _is_agreed(self) -> bool:
        if not self._has_others:
            return False
        self._n_waits += 1
        if self._n_waits % STEPS_BETWEEN_AGREEMENTS:
            return False
        return bool(ranks.anyone(self.number != 0))


@contextmanager
def interruptible(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """The items, for work that can end between any two of them, each rank by itself.

    Raises:
        Stopped: The process was asked to end.

    >>> with interruptible(range(3)) as numbers:
    ...     list(numbers)
    [0, 1, 2]
    """
    stop = Stop(together=False)
    with stop.on_signals(), stop.waiting():
        yield stop.between(items)
