"""One data set read by several threads and processes at once: all read the same, and none disturbs
another."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from fsspec import AbstractFileSystem
from huggingface_hub import HfFileSystem

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.data.text.datasets import Rows, load_texts, open_rows
from tests.reliability.children import CONTEXT

N_ROWS, N_FILES = 24, 3
N_THREADS, N_ROUNDS = 8, 50
TEXTS = [f"row {i}" for i in range(N_ROWS)]


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    """Without the hub's file systems that other tests have opened, and with the one that a process
    begins with.

    A streamed data set has all of them with it, one for each thread.
    """
    HfFileSystem.clear_instance_cache()
    HfFileSystem()


def write_folder(folder: Path, suffix: str = ".parquet", n_files: int = N_FILES) -> str:
    """A folder of so many files, its rows parted between them."""
    folder.mkdir()
    for i in range(n_files):
        name = str(folder / f"train-{i:05}{suffix}")
        part = Dataset.from_dict({"text": TEXTS[i::n_files], "n": [i] * len(TEXTS[i::n_files])})
        part.to_parquet(name) if suffix == ".parquet" else part.to_json(name)
    return str(folder)


def texts_of(rows: Rows, place: dict[str, Any] | None = None) -> list[str]:
    return [row["text"] for row, _ in rows.read(place)]


def at_once(do: Callable[[int], Any], n: int = N_THREADS) -> list[Any]:
    """What `do` returns in each of `n` new threads, which begin together."""
    barrier = threading.Barrier(n)

    def begin(i: int) -> Any:
        barrier.wait()
        return do(i)

    # New threads each time: what a thread has opened once, it has no more trouble with.
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(begin, range(n)))


def read_again_and_again(folder: str, rank: int, world_size: int) -> list[str]:
    """A share of the rows, read by several threads many times, half of them from the middle on."""
    HfFileSystem()
    rows = open_rows(folder).share(rank, world_size)
    whole = list(rows.read())
    texts, middle = [row["text"] for row, _ in whole], len(whole) // 2
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(N_ROUNDS):
            read = at_once(lambda i: texts_of(rows, whole[middle - 1][1] if i % 2 else None))
            assert read[::2] == [texts] * (N_THREADS // 2)
            assert read[1::2] == [texts[middle:]] * (N_THREADS // 2)
    finally:
        sys.setswitchinterval(interval)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("n_files", [2, 3])
def test_a_streamed_set_is_read_fifty_times_by_eight_threads_in_two_processes(
    n_files: int, tmp_path: Path
) -> None:
    # Two files are shared as files, three row by row.
    folder = write_folder(tmp_path / "d", n_files=n_files)
    with ProcessPoolExecutor(2, CONTEXT) as pool:
        shares = list(pool.map(read_again_and_again, [folder] * 2, [0, 1], [2, 2]))
    assert all(shares) and sorted([*shares[0], *shares[1]]) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("how", ["streamed", "whole", "saved"])
def test_threads_that_begin_together_read_the_same_rows(
    how: str, suffix: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "d", suffix)
    if how == "saved":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
        folder = str(tmp_path / "saved")
    rows = open_rows(folder, streaming=how == "streamed")
    expected = texts_of(rows)
    assert sorted(expected) == sorted(TEXTS)
    for _ in range(5):
        assert at_once(lambda _: texts_of(rows)) == [expected] * N_THREADS


@pytest.mark.slow
def test_threads_that_open_a_folder_each_for_itself_read_the_same_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d")
    for _ in range(3):
        read = at_once(lambda _: sorted(load_texts(folder)))
        assert read == [sorted(TEXTS)] * N_THREADS


def test_readers_that_take_turns_in_one_thread_do_not_move_one_another(tmp_path: Path) -> None:
    rows = open_rows(write_folder(tmp_path / "d"))
    expected = list(rows.read())
    readers = [rows.read() for _ in range(3)]
    for row in expected:
        assert [next(reader) for reader in readers] == [row] * 3


@pytest.mark.parametrize("n_files", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_reading_goes_on_from_every_place_of_another_that_still_reads(
    suffix: str, world_size: int, n_files: int, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "d", suffix, n_files)
    rows = open_rows(folder).share(world_size - 1, world_size)
    expected = texts_of(rows)
    assert len(expected) in (N_ROWS // world_size, N_ROWS // n_files)
    for i, (row, place) in enumerate(rows.read()):
        assert row["text"] == expected[i]
        assert texts_of(rows, place) == expected[i + 1 :]


def test_a_set_may_be_read_by_whoever_gave_it(tmp_path: Path) -> None:
    theirs = open_rows(write_folder(tmp_path / "d")).dataset
    assert isinstance(theirs, IterableDataset)
    reading = iter(theirs.with_format(None))
    next(reading)
    ours = Rows(theirs, "d")
    assert sorted(texts_of(ours)) == sorted(TEXTS)
    assert len(list(reading)) == N_ROWS - 1


# --- nothing is shared ---


# What a process has once: modules, types, the globals of functions, and the file systems that are
# open.
ONCE = (ModuleType, type, FunctionType, AbstractFileSystem)


def changeable(start: Any) -> dict[int, Any]:
    """All objects that can change and are reached from this one, by their address."""
    seen, ahead, found = set[int](), [start], dict[int, Any]()
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, ONCE) or one is HfFileSystem._cache:  # type: ignore[attr-defined]
            continue
        seen.add(id(one))
        if isinstance(one, dict | list | set) or hasattr(one, "__dict__"):
            found[id(one)] = one
        ahead += gc.get_referents(one)
    return found


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_two_readers_of_a_stream_have_no_object_in_common_that_can_change(
    suffix: str, n_ranks: int, tmp_path: Path
) -> None:
    rows = open_rows(write_folder(tmp_path / "d", suffix))
    shares = [rows.share(rank, n_ranks) for rank in range(n_ranks)]
    readers = [share._own() for share in [*shares, *shares, rows]]
    for reader in readers[:-1]:
        next(iter(reader))
    found = [changeable(one) for one in [*readers, rows.dataset]]
    # The template, the places and what knows the format, at the least.
    assert min(map(len, found)) > 40
    for i, one in enumerate(found):
        for other in found[:i]:
            assert [one[key] for key in one.keys() & other.keys()] == []


# --- whose fault it is ---


def raising(error: Exception) -> Rows:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise error

    return Rows(IterableDataset.from_generator(rows), "theirs")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("dictionary changed size during iteration"),
        AssertionError("not so"),
        NameError("name 'x' is not defined"),
    ],
)
def test_a_fault_of_the_program_is_not_blamed_on_the_data(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        list(raising(error).read())


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("bad"), TypeError("bad"), KeyError("bad"), AttributeError("bad")),
        *(OSError("bad"), EOFError("bad"), RecursionError("bad"), NotImplementedError("bad")),
    ],
)
def test_what_the_data_makes_its_readers_raise_names_the_data(error: Exception) -> None:
    with pytest.raises(ValueError, match="^Could not read data set 'theirs': .*bad"):
        list(raising(error).read())


def test_a_table_that_ends_too_early_is_the_datas_fault() -> None:
    with pytest.raises(ValueError, match="^Could not read data set 'theirs': .*StopIteration"):
        list(raising(StopIteration()).read())


# --- as a user meets it ---


@pytest.mark.slow
def test_a_training_reads_a_folder_of_parquet_as_it_is_by_default(
    tmp_path: Path, llama_folder: Path, gpt2_folder: Path
) -> None:
    (tmp_path / "d").mkdir()
    pages = [page[:600] for page in reference_pages()[:60]]
    Dataset.from_dict({"text": pages}).to_parquet(str(tmp_path / "d" / "train.parquet"))
    args = [
        *("--model-a.model-name", str(llama_folder), "--model-b.model-name", str(gpt2_folder)),
        *("--dataset-path", str(tmp_path / "d"), "--context-size", "48", "--eval-pairs", "300"),
        # Several passes over the text, each with readers of its own.
        *("--training-tokens", "16384", "--train-batch-size-tokens", "256"),
        *("--n-batches-in-buffer", "4", "--sae.d-sae", "64", "--sae.k", "4"),
    ]
    assert main(["train", *args, "--output-path", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "sae_weights.safetensors").is_file()
