from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_dfc.data.activations import PairedRows, StatefulBatch, StreamState
from sae_lens_dfc.data.batches import Batches, _shuffled, epochs, epochs_in_memory, shuffled

N, SIZE = 40, 25
Repeat = Callable[..., Iterator[StatefulBatch]]
EITHER = pytest.mark.parametrize("repeat", [epochs, epochs_in_memory])


def marked_rows(start: StreamState | None = None) -> Iterator[PairedRows]:
    """Rows whose two models carry the same mark: row i is (i, i, 1000 + i)."""
    nowhere = torch.zeros(SIZE, dtype=torch.long)
    for i in range(0 if start is None else start.values["next"], N):
        mark = torch.arange(i * SIZE, (i + 1) * SIZE).float()
        after = StreamState({"next": i + 1}, {"last": mark[-1:]})
        yield PairedRows(torch.stack([mark, mark, 1000 + mark], dim=1), nowhere, nowhere, (), after)


def marked_batches(
    repeat: Repeat = epochs,
    start: StreamState | None = None,
    mix_fraction: float = 0.5,
) -> Iterator[StatefulBatch]:
    return shuffled(
        lambda place: repeat(marked_rows, place),
        batch_size=32,
        buffer_size=200,
        mix_fraction=mix_fraction,
        seed=7,
        start=start,
    )


@EITHER
@pytest.mark.parametrize("prefetch", [0, 2])
def test_rows_stay_paired_through_every_shuffle(prefetch: int, repeat: Repeat) -> None:
    source = Batches(marked_batches(repeat), prefetch)
    for batch in islice(source, 100):
        assert torch.equal(batch[:, 0], batch[:, 1])
        assert torch.equal(batch[:, 0] + 1000, batch[:, 2])
    source.close()


def test_the_order_is_shuffled() -> None:
    first = torch.cat([m.acts for m in islice(marked_batches(), 5)])[:, 0]
    assert not torch.equal(first, first.sort().values)
    # A buffer of 200 rows mixes rows that were far apart: neighbors differ by about a third of it.
    assert (first[1:] - first[:-1]).abs().mean() > 40


class StoragesMade(TorchDispatchMode):
    """Counts the floating-point numbers of the tensors that operations make, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            # Kept, so that no other storage comes to its address.
            self.made[result.untyped_storage().data_ptr()] = result
        return result


def test_a_shuffle_copies_each_row_once() -> None:
    chunks = [torch.randn(n, 3) for n in (5, 2, 9)]
    draws, again = (torch.Generator().manual_seed(1) for _ in range(2))
    with StoragesMade() as storages:
        shuffled_rows = _shuffled(chunks, draws)
    assert sum(made.numel() for made in storages.made.values()) == 16 * 3
    assert torch.equal(shuffled_rows, torch.cat(chunks)[torch.randperm(16, generator=again)])


def test_without_mixing_rows_keep_their_order() -> None:
    rows = torch.cat([m.acts for m in islice(marked_batches(mix_fraction=0), 30)])[:, 0]
    assert torch.equal(rows, torch.arange(960.0))


def test_no_row_is_lost_or_served_twice_before_the_next_epoch() -> None:
    served = torch.cat([m.acts for m in islice(marked_batches(), 200)])[:, 0].long()
    counts = served.bincount(minlength=N * SIZE)
    # 6,400 of a thousand rows: six whole epochs, part of the seventh, and up to a buffer held back.
    assert counts.min() >= 6 - 1 and counts.max() <= 7 + 1
    assert counts.sum() == 6400


@EITHER
def test_an_epoch_gives_each_row_once_before_the_next(repeat: Repeat) -> None:
    rows = torch.cat([m.acts for m in islice(repeat(marked_rows), 80)])[:, 0]
    assert torch.equal(rows, torch.arange(1000.0).repeat(2))


@EITHER
@pytest.mark.parametrize("n", [0, 1, 5, 6, 7, 31, 33, 70, 200])
def test_batches_from_a_bookmark_are_those_that_would_have_come(n: int, repeat: Repeat) -> None:
    whole = list(islice(marked_batches(repeat), n + 40))
    start = whole[n - 1].after if n else None
    rest = list(islice(marked_batches(repeat, start), 40))
    for one, other in zip(rest, whole[n:], strict=True):
        assert torch.equal(one.acts, other.acts)
        assert one.after.values == other.after.values
        assert one.after.tensors.keys() == other.after.tensors.keys()


def test_what_is_made_ahead_does_not_move_the_bookmark() -> None:
    ahead, plain = Batches(marked_batches(), prefetch=4), marked_batches()
    for _ in range(20):
        batch, marked = next(ahead), next(plain)
        assert torch.equal(batch, marked.acts)
        assert ahead.after is not None and ahead.after.values == marked.after.values
    ahead.close()


def test_keeping_in_memory_runs_the_models_once() -> None:
    passes = 0

    def count(start: StreamState | None) -> Iterator[PairedRows]:
        nonlocal passes
        passes += 1
        return islice(marked_rows(start), 2)

    list(islice(epochs_in_memory(count), 10))
    assert passes == 1
    list(islice(epochs(count), 10))
    assert passes == 1 + 5


@pytest.mark.parametrize("n", [0, 3, 8])
def test_batches_of_the_text_without_a_pair_do_not_spoil_resuming(n: int) -> None:
    def gappy(start: StreamState | None) -> Iterator[PairedRows]:
        return (
            rows if i % 3 else rows._replace(acts=rows.acts[:0])
            for i, rows in enumerate(marked_rows(start), start=start.values["next"] if start else 0)
        )

    def served(start: StreamState | None = None) -> Iterator[StatefulBatch]:
        # The smallest buffer: any batch that comes makes it draw anew.
        return shuffled(lambda place: epochs(gappy, place), 32, 32, mix_fraction=0.9, start=start)

    whole = list(islice(served(), n + 30))
    rest = list(islice(served(whole[n - 1].after if n else None), 30))
    assert all(torch.equal(a.acts, b.acts) for a, b in zip(rest, whole[n:], strict=True))


@EITHER
def test_a_text_without_a_pair_is_an_error_not_an_endless_loop(repeat: Repeat) -> None:
    empty = PairedRows(torch.empty(0, 3), torch.empty(0).long(), torch.empty(0).long())
    with pytest.raises(ValueError, match="no paired position"):
        next(repeat(lambda _: iter([empty])))


def test_a_buffer_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="got 10 rows for batches of 32"):
        next(shuffled(lambda _: iter(list[StatefulBatch]()), batch_size=32, buffer_size=10))


def test_the_shuffle_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(marked_batches(), 20))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_end_end_the_batches() -> None:
    def once(_: StreamState | None) -> Iterator[StatefulBatch]:
        return (StatefulBatch(rows.acts, rows.after) for rows in marked_rows())

    rows: list[Tensor] = [m.acts for m in shuffled(once, batch_size=32, buffer_size=200)]
    assert 750 < sum(map(len, rows)) <= 1000
