"""Work that is killed, at whatever moment, and started again ends with the bits that it would have
had."""

import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from sae_lens_dfc.core.output_folder import file_lock
from tests.reliability.children import (
    Child,
    die_at_file_operation,
    files,
    run,
    write_file_operations,
)
from tests.reliability.conftest import Jobs

KILLED = -9
JOBS = ("cache", "train", "train on a cache", "evaluate", "screen")


def result(folder: Path) -> dict[str, bytes]:
    """What a job is for. Settings are left out: they name the folder."""
    found = files(folder)
    return {name: content for name, content in found.items() if name != "runner_cfg.json"}


def left_over(folder: Path) -> list[str]:
    """What nobody will use: temporary files and folders, of which a restart should leave none."""
    return [str(p) for p in folder.rglob("*") if p.name.endswith((".unfinished", ".new", ".tmp"))]


def is_done(name: str, folder: Path) -> bool:
    """Whether it has its result, which comes whole or not at all; a cache is put together where it
    stays."""
    return (folder / "manifest.json" if name == "cache" else folder).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_ends_with_the_same_bits_when_it_is_started_again(
    name: str, jobs: Jobs, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    assert_ends_with_the_same_bits(
        name, jobs, tmp_path, int(str(pytestconfig.getoption("--kills")))
    )


def test_a_training_killed_at_a_file_ends_with_the_same_bits(jobs: Jobs, tmp_path: Path) -> None:
    assert_ends_with_the_same_bits("train on a cache", jobs, tmp_path, 1)


def assert_ends_with_the_same_bits(name: str, jobs: Jobs, tmp_path: Path, n_kills: int) -> None:
    """Kill a job so many times, the first time at one of its file operations and then at a moment,
    in turn."""
    whole, counts = tmp_path / "whole" / "out", tmp_path / "operations"
    whole.parent.mkdir()
    counting = partial(write_file_operations, str(counts), str(whole.parent))
    uninterrupted = run(jobs.of(name, whole), tmp_path, counting)
    assert uninterrupted.status == 0, uninterrupted.errors
    n_operations = counts.stat().st_size
    draws, n_killed = random.Random(name), 0
    for i in range(1, n_kills + 1):
        folder = tmp_path / f"killed {i}"
        folder.mkdir()
        arguments = jobs.of(name, folder / "out")
        # Twice each: the second time it is killed while it goes on.
        for _ in range(2):
            n = draws.randint(1, n_operations)
            at_file = partial(die_at_file_operation, n, str(folder))
            child = Child(arguments, tmp_path / "errors.txt", at_file if i % 2 else None)
            if i % 2 == 0:
                child.process.join(draws.uniform(0, uninterrupted.seconds))
                child.kill()
            ended = child.ended()
            assert ended.status in (KILLED, 0), ended.errors
            n_killed += ended.status == KILLED
            if is_done(name, folder / "out"):
                break
        if not is_done(name, folder / "out"):
            ended = run(arguments, tmp_path)
            assert ended.status == 0, ended.errors
            assert not left_over(folder)
        assert result(folder / "out") == result(whole)
        with file_lock(folder / "out"):
            # What was killed when its result was in place is tidied up after by the next to work
            # there.
            assert not left_over(folder)
        shutil.rmtree(folder)
    assert n_killed >= n_kills / 2, "they were to be killed"
