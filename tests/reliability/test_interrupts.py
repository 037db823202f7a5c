"""Ctrl-C, and what a cluster sends before it takes the machine back."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from sae_lens_dfc.core.interrupts import (
    GRACE_PERIOD,
    GracefulShutdown,
    Interrupted,
    interruptible,
    signals_to,
    stop_now,
)
from sae_lens_dfc.data.activations import StatefulBatch, StreamState
from sae_lens_dfc.data.batches import Batches
from sae_lens_dfc.data.cache import writer as writer_module
from sae_lens_dfc.data.cache.manifest import Shard, WriterProgress, progress_path
from sae_lens_dfc.data.cache.writer import CacheWriter
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.training.checkpoint import checkpoints
from tests.data.cache.test_cache import HEADER, in_order, marked, write
from tests.reliability.children import (
    Child,
    Prepare,
    ask_to_end,
    do_when_called,
    do_when_touched,
    run,
    stall_while,
)
from tests.reliability.conftest import Jobs
from tests.reliability.test_kills import left_over, result

SECONDS_TO_STOP = 5


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """In the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_new_checkpoint(folder: Path, child: Child) -> None:
    """Wait until a training saves one, which it does soon."""
    before = checkpoints(folder)
    while checkpoints(folder) == before and child.process.is_alive():
        time.sleep(0.001)


def long_training(jobs: Jobs, output: Path, prefetch: int) -> list[str]:
    """One that a busy machine has not ended with before it is asked to end."""
    steps = ("--training-tokens", str(64 * 2_000), "--n-checkpoints", "10")
    return [*jobs.of("train", output), *steps, "--prefetch-llm-batches", str(prefetch)]


@pytest.fixture(scope="module")
def never_stopped(
    jobs: Jobs, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, bytes]]:
    """What a training comes to that nobody stops, by how many batches are made ahead."""
    folder, found = tmp_path_factory.mktemp("never stopped"), dict[int, dict[str, bytes]]()
    for prefetch in (0, 2):
        output = folder / str(prefetch) / "out"
        output.parent.mkdir()
        assert run(long_training(jobs, output, prefetch), folder, timeout=600).status == 0
        found[prefetch] = result(output)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_training_asked_to_end_saves_the_step_that_it_is_at_and_goes_on_to_the_same_bits(
    number: signal.Signals,
    prefetch: int,
    jobs: Jobs,
    tmp_path: Path,
    never_stopped: dict[int, dict[str, bytes]],
) -> None:
    folder, draws = tmp_path / "out-checkpoints", random.Random(f"{number} {prefetch}")
    command = long_training(jobs, tmp_path / "out", prefetch)
    for _ in range(2):
        child = Child(command, tmp_path / "errors.txt")
        at_new_checkpoint(folder, child)
        time.sleep(draws.uniform(0, 0.1))
        child.kill(number)
        asked = time.monotonic()
        ended = child.ended()
        assert time.monotonic() - asked < SECONDS_TO_STOP
        assert ended.status == 128 + number
        last = checkpoints(folder)[-1]
        assert f"stopped after {last.name} samples, saved in {last}: continue" in ended.error
    assert run(command, tmp_path).status == 0
    assert result(tmp_path / "out") == never_stopped[prefetch]


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_training_whose_text_stalls_as_a_download_does_saves_its_step_all_the_same(
    prefetch: int, jobs: Jobs, tmp_path: Path, never_stopped: dict[int, dict[str, bytes]]
) -> None:
    folder, stalls = tmp_path / "out-checkpoints", tmp_path / "stalls"
    command = long_training(jobs, tmp_path / "out", prefetch)
    stalling = partial(do_when_called, "sae_lens_dfc.data.pair:clean", partial(stall_while, stalls))
    child = Child(command, tmp_path / "errors.txt", stalling)
    at_new_checkpoint(folder, child)
    stalls.touch()
    time.sleep(3)
    at_stall = len(checkpoints(folder))
    time.sleep(1)
    assert len(checkpoints(folder)) == at_stall, "it goes on"
    child.kill(signal.SIGTERM)
    asked = time.monotonic()
    ended = child.ended()
    assert time.monotonic() - asked < SECONDS_TO_STOP
    assert ended.status == 128 + signal.SIGTERM
    assert f"saved in {checkpoints(folder)[-1]}" in ended.error
    assert run(command, tmp_path).status == 0
    assert result(tmp_path / "out") == never_stopped[prefetch]


# Where each job is when it is asked to end: at the n-th path of a pattern, or at a function that
# only its middle calls.
IN_THE_MIDST: dict[str, tuple[str, Callable[[Prepare], None]]] = {
    "cache": ("cache", partial(do_when_touched, "*/.rows-*.new", 3)),
    "evaluate, a null in training": (
        "evaluate",
        partial(do_when_called, "sae_lens_dfc.training.trainer:firing_counts"),
    ),
    "evaluate, writing": ("evaluate", partial(do_when_touched, "*.unfinished/new", 1)),
    "screen, a latent tested": ("screen", partial(do_when_touched, "*.progress.jsonl", 1)),
    "screen, writing": ("screen", partial(do_when_touched, "*.unfinished/new", 1)),
    "export, writing": ("export", partial(do_when_touched, "*.unfinished/new", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", IN_THE_MIDST)
def test_any_job_asked_to_end_ends_soon_and_leaves_nothing_half_done(
    when: str, jobs: Jobs, tmp_path: Path
) -> None:
    name, in_the_midst = IN_THE_MIDST[when]
    folder, whole = tmp_path / "out", tmp_path / "whole"
    assert run(jobs.of(name, whole), tmp_path).status == 0
    asked = tmp_path / "asked"
    ended = run(jobs.of(name, folder), tmp_path, partial(in_the_midst, partial(ask_to_end, asked)))
    assert time.monotonic() - float(asked.read_text()) < SECONDS_TO_STOP
    assert ended.status == 128 + signal.SIGTERM and "stopped" in ended.error
    assert not left_over(tmp_path)
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("rows-*")}
    if name == "cache":
        assert shards and all(p.read_bytes() == (whole / p.name).read_bytes() for p in shards)
    else:
        assert not folder.exists()
    assert run(jobs.of(name, folder), tmp_path).status == 0
    assert all(path.stat().st_mtime_ns == at for path, at in shards.items()), "made again"
    assert result(folder) == result(whole)


def test_a_cache_interrupted_while_it_waits_for_a_shard_goes_on_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer_module._write_shard

    def interrupted(path: Path, columns: dict[str, torch.Tensor]) -> Shard:
        if path.name.endswith("000001.safetensors"):
            _send(begun, signal.SIGTERM)
            time.sleep(0.2)
        return real(path, columns)

    begun = threading.Event()
    begun.set()
    writer = CacheWriter(tmp_path / "c", HEADER)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_write_shard", interrupted)
        with signals_to(stop_now), pytest.raises(Interrupted):
            writer.write(marked(), PairCounts())
    kept, _ = WriterProgress.load(progress_path(tmp_path / "c", 0))
    assert [shard.file for shard in kept.shards] == [
        f"rows-00000-{i:06d}.safetensors" for i in range(len(kept.shards))
    ]
    assert torch.equal(in_order(write(tmp_path / "c")), in_order(write(tmp_path / "whole")))


# --- where it may be interrupted ---


def slow_batches(begun: threading.Event) -> object:
    for i in range(3):
        if i == 1:
            begun.set()
            time.sleep(60)
        yield StatefulBatch(torch.full((1,), i), StreamState({"batches": i + 1}))


@pytest.mark.first_is_fast
@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_wait_for_a_batch_is_interrupted_and_the_batch_is_not_counted(prefetch: int) -> None:
    stop, begun = GracefulShutdown(), threading.Event()

    with stop.on_signals():
        batches = Batches(slow_batches(begun), prefetch, stop=stop)  # type: ignore[arg-type]
        assert int(next(batches)) == 0
        other = threading.Thread(target=partial(_send, begun))
        other.start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            next(batches)
        other.join()
    assert time.monotonic() - began < SECONDS_TO_STOP
    assert batches.after is not None and batches.after.values == {"batches": 1}


def ask_at(n: int) -> Callable[[object, str, object], None]:
    """A profile function that has this process asked to end at the n-th call or return of the main
    thread from now."""
    left = count(n, -1)

    def at_event(*_: object) -> None:
        if next(left) == 0:
            signal.raise_signal(signal.SIGTERM)

    return at_event


@pytest.mark.parametrize("prefetch", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_wherever_a_wait_is_when_it_is_asked_to_end_it_does_and_no_lock_stays_taken(
    prefetch: int,
) -> None:
    n_threads, at = threading.active_count(), 0
    is_asked = True
    while is_asked:
        stop = GracefulShutdown()
        rows = (StatefulBatch(torch.zeros(1), StreamState({"batches": i})) for i in count())
        with stop.on_signals():
            batches = Batches(stop.between(rows), prefetch, stop=stop)  # type: ignore[arg-type]
            sys.setprofile(ask_at(at))
            try:
                with suppress(Interrupted):
                    next(batches)
            finally:
                sys.setprofile(None)
            is_asked = stop.number != 0
            if is_asked:
                with pytest.raises(Interrupted):
                    next(batches)
            batches.close()
        assert threading.active_count() == n_threads, f"asked at event {at}"
        at += 1
    assert at > 10


def _send(begun: threading.Event, number: signal.Signals = signal.SIGINT) -> None:
    begun.wait()
    time.sleep(0.2)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def test_a_second_ctrl_c_interrupts_at_once_but_not_what_only_follows_the_first_signal() -> None:
    stop, before = GracefulShutdown(), signal.getsignal(signal.SIGINT)
    with stop.on_signals():
        # torchrun's processes have Ctrl-C from the terminal and from torchrun; systemd sends SIGHUP
        # after SIGTERM.
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.number == signal.SIGINT
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_wait_goes_to_whoever_had_the_signals_before(
    number: signal.Signals,
) -> None:
    done: list[int] = []
    with signals_to(stop_now), pytest.raises(Interrupted) as stopped:  # noqa: PT012
        with interruptible(range(3)) as numbers:
            done += numbers
            signal.raise_signal(number)
            done.append(3)
        done.append(4)
    assert done == [0, 1, 2, 3] and stopped.value.number == number


def test_a_signal_that_was_acted_on_is_not_passed_on() -> None:
    done: list[int] = []
    with signals_to(stop_now):
        with suppress(Interrupted), interruptible(count()) as numbers:
            for i in numbers:
                done.append(i)
                if i == 2:
                    signal.raise_signal(signal.SIGTERM)
        done.append(-1)
    assert done == [0, 1, 2, -1]


@pytest.mark.slow
def test_what_ends_is_not_interrupted_once_more_while_it_puts_away_what_it_has() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted), interruptible(count()) as numbers:
        try:
            for i in numbers:
                if i == 2:
                    signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(GRACE_PERIOD + 0.2)
            done.append("put away")
    assert done == ["put away"]


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown().on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_takes_no_signals() -> None:
    handlers: list[object] = []

    def look() -> None:
        with GracefulShutdown().on_signals():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


@pytest.mark.slow
def test_processes_of_a_benchmark_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "recovery"]
    parent = subprocess.Popen(
        [*command, "--jobs", "2", "--output", str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def workers() -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(parent.pid), "-f", "spawn_main"],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(line) for line in found.stdout.split()]

    deadline = time.monotonic() + 90
    while len(children := workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    # They notice when they have imported what they work with.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(map(is_running, children)):
        time.sleep(0.1)
    assert len(children) == 2 and not any(map(is_running, children))


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


HALF_READ = """
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens_dfc.core.interrupts import close_soon

def rows():
    ahead = PrefetchingIterator(iter(range(1000)), 2)
    try:
        yield from ahead
    finally:
        close_soon(ahead)
"""


# A cycle, as a traceback that is kept makes one: Python collects it last, when it begins no thread
# any more.
LEFT_OPEN = """
import half_read

class Kept: ...

kept = Kept()
kept.itself, kept.rows = kept, half_read.rows()
print(next(kept.rows))
del kept
"""


@pytest.mark.slow
def test_python_ends_though_rows_were_left_half_read(tmp_path: Path) -> None:
    """As in a notebook that looks at the first of a text's rows."""
    (tmp_path / "half_read.py").write_text(HALF_READ)
    command, env = (
        [sys.executable, "-c", LEFT_OPEN],
        {**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr
