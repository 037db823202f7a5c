"""Graceful shutdown: on SIGINT or SIGTERM, finishes the current step, then stops at a resumable
point."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_dfc.core import distributed

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
ALARMS = [getattr(signal, name) for name in ("SIGALRM",) if hasattr(signal, name)]
# Ranks must stop at the same step, but agreeing at every step would synchronize with the GPU each
# time.
STEPS_BETWEEN_AGREEMENTS = 16
GRACE_PERIOD = 2.0
"""Seconds after a signal before a blocking wait is interrupted."""

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):  # noqa: N818
    """Work stopped early because the process received a signal.

    Args:
        number: The signal.
        message: What was saved and how to resume.
    """

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.number = number


def stop_now(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Signal handler for work that can be interrupted anywhere.

    Raises:
        Interrupted: Always.
    """
    raise Interrupted(number)


@contextmanager
def signals_to(
    handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int] = SIGNALS
) -> Iterator[None]:
    """Install `handler` for the signals that end a process, or for others, inside the block.

    Ignored signals, as under nohup, and handlers that were not installed from Python are left
    unchanged. Outside the main thread, where Python cannot install handlers, this does nothing.
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
    """Stop a prefetch thread, waiting for it for at most `GRACE_PERIOD`.

    It may be in a download that stalls, and then ends after that, or with the process.
    """
    # During shutdown, Python starts no threads and would wait forever for this one to start.
    if sys.is_finalizing():
        return
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    closing.join(GRACE_PERIOD)


class GracefulShutdown:
    """Shutdown request of this process, for work that marks where it can be interrupted.

    The first signal is stored until the work next enters `waiting`, or asks `between` for an item,
    which raises `Interrupted`. If a wait lasts two seconds after the signal, such as a download
    that stalls, it is interrupted where it is; not sooner, because an exception between acquiring a
    lock and entering its block can leave it locked forever.

    A second Ctrl-C, at least a second later, interrupts immediately. Other later signals do not,
    because a process often receives several (torchrun forwards those that its processes already got
    from the terminal, and systemd adds SIGHUP). A signal after the last wait is passed to the
    previous handlers.

    Args:
        together: Whether all ranks stop at the same step; otherwise each rank stops independently.

    >>> stop = GracefulShutdown()
    >>> with stop.on_signals():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     print("this step is done")
    ...     try:
    ...         with stop.waiting():
    ...             print("no other is begun")
    ...     except Interrupted as stopped:
    ...         print(signal.Signals(stopped.number).name)
    this step is done
    SIGTERM
    """

    def __init__(self, together: bool = True) -> None:
        self._together = together
        self.number = 0
        """The signal received; 0 if none."""
        self._asked = 0.0
        # With several ranks, whether all of them know of the signal.
        self._is_certain = False
        self._is_fulfilled = False
        self._is_waiting = False
        self._n_waits = 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        with signals_to(self._on_alarm, ALARMS):
            try:
                with signals_to(self._on_signal):
                    yield
            finally:
                # Only after the previous handlers are restored, because each signal may set the
                # timer.
                if ALARMS and self.number:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        if self.number and not self._is_fulfilled:
            signal.raise_signal(self.number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._asked = number, time.monotonic()
            # With several ranks, the others are informed first, at a step that all of them reach.
            self._is_certain = not self._has_others
            if ALARMS and self._is_certain:
                signal.setitimer(signal.ITIMER_REAL, GRACE_PERIOD)
        elif number == signal.SIGINT and time.monotonic() - self._asked > 1:
            self._is_fulfilled = True
            stop_now(number, frame)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._is_waiting:
            stop_now(self.number, frame)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that can be interrupted, so nothing done in it may count as completed.

        Raises:
            Interrupted: The process received a signal.
        """
        self._is_waiting = True
        try:
            if self._is_agreed():
                self._is_certain = True
            self._check()
            yield
        except Interrupted:
            self._is_fulfilled = True
            raise
        finally:
            self._is_waiting = False

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items until shutdown is requested; usable in any thread.

        Raises:
            Interrupted: The process received a signal.
        """
        for item in items:
            self._check()
            yield item

    def _check(self) -> None:
        if self._is_certain:
            # Cleanup after this exception must not be interrupted again.
            self._is_waiting = False
            raise Interrupted(self.number or signal.SIGTERM)

    @property
    def _has_others(self) -> bool:
        return self._together and distributed.world_size() > 1

    def _is_agreed(self) -> bool:
        if not self._has_others:
            return False
        self._n_waits += 1
        if self._n_waits % STEPS_BETWEEN_AGREEMENTS:
            return False
        return bool(distributed.all_reduce_any(self.number != 0))


@contextmanager
def interruptible(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate over items with shutdown possible between any two; each rank stops independently.

    Raises:
        Interrupted: The process received a signal.

    >>> with interruptible(range(3)) as numbers:
    ...     list(numbers)
    [0, 1, 2]
    """
    stop = GracefulShutdown(together=False)
    with stop.on_signals(), stop.waiting():
        yield stop.between(items)
