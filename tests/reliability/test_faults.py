"""What a machine does to long work: no room, no right to write, no memory, others at work, a clock
that jumps."""

import json
import os
import re
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from sae_lens_dfc.core.journal import Journal
from sae_lens_dfc.core.output_folder import file_lock
from sae_lens_dfc.training.checkpoint import checkpoints
from tests.reliability.children import (
    Child,
    do_when_touched,
    files,
    fill,
    have_the_clock_jump,
    remount,
    run,
    small_disk,
    take_memory_away,
)
from tests.reliability.conftest import Jobs
from tests.reliability.test_kills import left_over, result

JOBS = ("cache", "train", "evaluate", "screen", "export")
# When the disk fills: at the n-th path of a pattern.
FULL_AT = {
    "cache": ("cache", "*/.rows-*.new", 2),
    "train, at a checkpoint": ("train", "*-checkpoints/.*.new", 2),
    "train": ("train", "*.unfinished/new", 1),
    "evaluate": ("evaluate", "*.unfinished/new", 1),
    "screen, while it tests": ("screen", "*.progress.jsonl", 1),
    "screen": ("screen", "*.unfinished/new", 1),
    "export": ("export", "*.unfinished/new", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", FULL_AT)
def test_a_full_disk_is_one_clear_error_and_what_was_written_serves_when_there_is_room(
    when: str, jobs: Jobs, tmp_path: Path
) -> None:
    name, pattern, n = FULL_AT[when]
    whole = tmp_path / "whole"
    assert run(jobs.of(name, whole), tmp_path).status == 0
    size = sum(map(len, files(tmp_path).values()))
    with small_disk(tmp_path / "disk", f"{10 * size // 1024}k") as disk:
        filler = disk / "filler"
        filling = partial(do_when_touched, f"{disk}/{pattern}", n, partial(fill, filler))
        ended = run(jobs.of(name, disk / "out"), tmp_path, filling)
        assert ended.status == 1 and "No space left on device" in ended.error, ended.errors
        assert not left_over(disk)
        filler.unlink()
        assert run(jobs.of(name, disk / "out"), tmp_path).status == 0
        assert result(disk / "out") == result(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_disk_that_cannot_be_written_is_refused_before_any_work(
    name: str, jobs: Jobs, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        ended = run(jobs.of(name, disk / "out"), tmp_path)
        assert ended.status == 1 and "cannot be made in" in ended.error, ended.errors
        remount(disk, "rw")
        assert not list(disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_never_work_on_one_folder(name: str, jobs: Jobs, tmp_path: Path) -> None:
    with file_lock(tmp_path / "out"):
        ended = run(jobs.of(name, tmp_path / "out"), tmp_path)
        assert ended.status == 1
        assert f"Another process is at work on {tmp_path / 'out'}" in ended.error
        assert not (tmp_path / "out").exists()
    assert run(jobs.of(name, tmp_path / "out"), tmp_path).status == 0


@pytest.mark.slow
def test_of_trainings_begun_together_one_trains_and_the_others_say_why_not(
    jobs: Jobs, tmp_path: Path
) -> None:
    # Resumed, one that comes when the first has ended would find all done.
    arguments = [one for one in jobs.of("train", tmp_path / "out") if one != "--resume"]
    children = [Child(arguments, tmp_path / f"errors {i}.txt") for i in range(3)]
    ended = [child.ended() for child in children]
    assert sorted(e.status for e in ended) == [0, 1, 1], ended
    why = r"Another process is at work|holds checkpoints of a training|already holds a run"
    assert all(re.search(why, e.error) for e in ended if e.status == 1)
    assert run(jobs.of("train", tmp_path / "whole"), tmp_path).status == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train on a cache"])
def test_too_little_memory_is_one_clear_error(name: str, jobs: Jobs, tmp_path: Path) -> None:
    arguments = [*jobs.of(name, tmp_path / "out"), "--sae.d-sae", "20000000"]
    ended = run(arguments, tmp_path, partial(take_memory_away, 2_000_000_000))
    assert ended.status == 1 and "Out of memory" in ended.error
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


@pytest.mark.slow
def test_a_cache_removed_while_it_is_read_is_one_clear_error_and_no_work_is_lost(
    jobs: Jobs, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(jobs.cache, cache)
    of_cache = Jobs(jobs.settings, jobs.run, cache)
    arguments = [*of_cache.of("train on a cache", tmp_path / "out"), "--cache-window-shards", "2"]
    taking_away = partial(os.rename, cache, tmp_path / "away")
    at_checkpoint = f"{tmp_path}/out-checkpoints/.*.new"
    ended = run(arguments, tmp_path, partial(do_when_touched, at_checkpoint, 1, taking_away))
    assert ended.status == 1 and str(cache) in ended.error and "Restore it" in ended.error
    assert checkpoints(tmp_path / "out-checkpoints") and not (tmp_path / "out").exists()
    shutil.move(tmp_path / "away", cache)
    assert run(arguments, tmp_path).status == 0
    whole = [*of_cache.of("train on a cache", tmp_path / "whole"), "--cache-window-shards", "2"]
    assert run(whole, tmp_path).status == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_clock_that_jumps_changes_nothing(name: str, jobs: Jobs, tmp_path: Path) -> None:
    looks = tmp_path / "looks"
    jumping = partial(have_the_clock_jump, 1, looks)
    assert run(jobs.of(name, tmp_path / "out"), tmp_path, jumping).status == 0
    assert looks.stat().st_size > 0
    assert run(jobs.of(name, tmp_path / "whole"), tmp_path).status == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_what_was_about_to_take_its_place_when_the_process_died_takes_it(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.unfinished"
    for part in ("old", "new"):
        (left / part).mkdir(parents=True)
        (left / part / "what").write_text(part)
    others = tmp_path / ".out.b.abcd1234.unfinished"
    others.mkdir()
    with file_lock(tmp_path / "out"):
        assert (tmp_path / "out" / "what").read_text() == "new"
        assert not left.exists() and others.exists()


def test_what_was_not_whole_when_the_process_died_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd1234.unfinished" / "new").mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(file_lock(tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        with pytest.raises(ValueError, match="Another process is at work on"):
            stack.enter_context(file_lock(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_line_of_progress_cut_short_leaves_the_others_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    Journal(path, {}).done("one", lambda: 1)
    whole = path.read_text()
    path.write_text(whole + json.dumps({"name": "two"})[:-1])

    def full(*_: object, **_encoding: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            Journal(path, {})
    assert path.read_text().startswith(whole)
    assert Journal(path, {}).results == {"one": 1}
    assert path.read_text() == whole
