"""Work that goes on for long takes no more memory than at its beginning, and leaves nothing behind
when it ends.

`--minutes 120` makes a loop as long as a night's would be; in CI a minute must do.
"""

import ctypes
import gc
import json
import resource
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_lens_dfc import CrosscoderRunnerConfig, CrosscoderTrainingRunner
from sae_lens_dfc.analysis.evaluation.evaluate_run import evaluate_fully
from sae_lens_dfc.analysis.options import EvaluateOptions
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.checkpoint import checkpoints
from tests.reliability.children import CONTEXT, Child
from tests.reliability.conftest import Jobs

GROWTH = 1.01
GROWTH_OF_JOBS = 1.05
"""Of the memory that a process has after a job, which varies by 2 % with how what is free lies."""
BYTES_A_JOB, BLOCKS_A_JOB = 2**15, 500
"""What a job may leave: it leaves 5 KiB, and 150 blocks of Python's, in caches of libraries."""


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def minutes(config: pytest.Config) -> float:
    return float(str(config.getoption("--minutes")))


def write_memory(path: str, every: float) -> None:
    """Have this process write how much memory it has, again and again."""

    def watch() -> None:
        while True:
            with open(path, "a") as file:
                file.write(f"{resident()}\n")
            time.sleep(every)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train on a cache"])
def test_a_long_training_takes_no_more_memory_than_at_its_beginning_and_stops_when_asked(
    name: str, jobs: Jobs, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seconds = 60 * minutes(pytestconfig)
    memory = tmp_path / "memory.txt"
    arguments = [*jobs.of(name, tmp_path / "out"), "--training-tokens", "100000000000"]
    child = Child(arguments, tmp_path / "errors.txt", partial(write_memory, str(memory), 0.25))
    child.process.join(seconds)
    asked = time.monotonic()
    child.kill(signal.SIGINT)
    ended = child.ended()
    assert time.monotonic() - asked < 5
    assert ended.status == 128 + signal.SIGINT and "continue with --resume" in ended.error
    assert checkpoints(tmp_path / "out-checkpoints")
    samples = [int(line) for line in memory.read_text().split()]
    # What a training takes for good it has after its first buffers and steps.
    begun = samples[len(samples) // 3 :]
    third = len(begun) // 3
    first, last = statistics.median(begun[:third]), statistics.median(begun[-third:])
    print(f"{name}: {first / 2**20:.1f} MiB at first, {last / 2**20:.1f} at last")  # noqa: T201
    assert last <= GROWTH * first


def n_hooks(pair: ModelPair) -> int:
    models = [hooked.model for hooked in (pair.a, pair.b)]
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for model in models
        for module in model.modules()
    )


class Mallinfo2(ctypes.Structure):
    """glibc's count of what malloc has given out, over all arenas."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def in_use() -> int:
    """Bytes that malloc has given out and not got back; exact, unlike the memory that the process
    has."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


class Left(NamedTuple):
    """What a process has after a job."""

    memory: int
    in_use: int
    blocks: int
    """Of Python's own allocator, which holds small objects."""
    objects: int
    hooks: int
    threads: int

    @classmethod
    def by(cls, pair: ModelPair) -> "Left":
        """What this process has now."""
        blocks, objects = sys.getallocatedblocks(), len(gc.get_objects())
        return cls(resident(), in_use(), blocks, objects, n_hooks(pair), threading.active_count())


def repeat(
    cfg: CrosscoderRunnerConfig, options: EvaluateOptions, seconds: float, path: str
) -> None:
    """Train and evaluate, again and again, at least 12 times, and write what is left after each."""
    pair = ModelPair.load(cfg.model_a, cfg.model_b)
    before = Left.by(pair)
    Path(path).write_text(f"{json.dumps(before)}\n")
    deadline, n = time.monotonic() + seconds, 0
    while time.monotonic() < deadline or n < 12:
        # The tokenizers library keeps the words that a thread's tokenizers have met until the
        # thread ends, half a MiB a job.
        with ThreadPoolExecutor(1) as alone:
            alone.submit(CrosscoderTrainingRunner(cfg, pair).run).result()
            alone.submit(evaluate_fully, options).result()
        gc.collect()
        # What malloc keeps for later varies by 8 % of the memory from job to job.
        ctypes.CDLL(None).malloc_trim(0)
        left = Left.by(pair)
        with open(path, "a") as file:
            file.write(f"{json.dumps(left)}\n")
        n += 1


@pytest.mark.slow
def test_jobs_one_after_the_other_leave_no_thread_no_hook_no_object_and_no_memory(
    jobs: Jobs,
    llama_config: ModelConfig,
    gpt2_config: ModelConfig,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    cfg = CrosscoderRunnerConfig(
        sae=DFCTrainingCrosscoderConfig(
            d_sae=64, k=4, a_exclusive_fraction=0.2, b_exclusive_fraction=0.2
        ),
        model_a=llama_config,
        model_b=gpt2_config,
        dataset_path=str(jobs.settings.parent / "text.jsonl"),
        eval_every_n_documents=4,
        context_size=48,
        training_tokens=64 * 20,
        train_batch_size_tokens=64,
        n_batches_in_buffer=8,
        output_path=str(tmp_path / "run"),
        overwrite=True,
    )
    options = EvaluateOptions(
        runs=[str(jobs.run)], output=str(tmp_path / "measured"), overwrite=True, null=["shuffle"]
    )
    options = replace(options, downstream_pairs=100, behavior_latents=1, null_pairs=500)
    # In a process without the tests' checks of types, whose caches keep what they have met: these
    # grew by 3 % over 12 jobs.
    written = tmp_path / "left.txt"
    process = CONTEXT.Process(
        target=repeat, args=(cfg, options, 60 * minutes(pytestconfig), str(written))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    before, *after = [Left(*json.loads(line)) for line in written.read_text().splitlines()]
    assert {left.threads for left in after} == {before.threads}
    assert {left.hooks for left in after} == {before.hooks}
    # The first jobs fill what libraries keep for good.
    begun = after[len(after) // 2 :]
    n = len(begun) - 1
    assert begun[-1].objects - begun[0].objects < n  # not one object a job
    assert begun[-1].in_use - begun[0].in_use < BYTES_A_JOB * n
    assert begun[-1].blocks - begun[0].blocks < BLOCKS_A_JOB * n
    third = max(1, len(begun) // 3)
    first = statistics.median(left.memory for left in begun[:third])
    last = statistics.median(left.memory for left in begun[-third:])
    print(  # noqa: T201
        f"{len(after)} jobs: {first / 2**20:.1f} MiB at first, {last / 2**20:.1f} at last\n"
        f"at first {begun[0]}\nat last {begun[-1]}"
    )
    assert last <= GROWTH_OF_JOBS * first
