from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.provider import epochs, shuffled_batches


def marked_rows(n: int = 40, size: int = 25) -> Iterator[PairedRows]:
    """Rows whose two models carry the same mark: row i is (i, i, 1000 + i)."""
    for start in range(0, n * size, size):
        mark = torch.arange(start, start + size).float()
        nowhere = torch.zeros(size, dtype=torch.long)
        yield PairedRows(torch.stack([mark, mark, 1000 + mark], dim=1), nowhere, nowhere)


def batches(prefetch: int, keep: bool = True) -> Iterator[torch.Tensor]:
    return shuffled_batches(
        epochs(marked_rows, keep), batch_size=32, buffer_size=200, prefetch=prefetch
    )


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_rows_stay_paired_through_every_shuffle(prefetch: int, keep: bool) -> None:
    source = batches(prefetch, keep)
    for batch in islice(source, 100):
        assert torch.equal(batch[:, 0], batch[:, 1])
        assert torch.equal(batch[:, 0] + 1000, batch[:, 2])
    if isinstance(source, PrefetchingIterator):
        source.close()


def test_the_order_is_shuffled() -> None:
    first = torch.cat(list(islice(batches(0), 5)))[:, 0]
    assert not torch.equal(first, first.sort().values)
    # A buffer of 200 rows mixes rows that were far apart: neighbours differ by about a third of it.
    assert (first[1:] - first[:-1]).abs().mean() > 40


@pytest.mark.parametrize("keep", [True, False])
def test_an_epoch_serves_each_row_once_before_the_next(keep: bool) -> None:
    rows = torch.cat(list(islice(epochs(marked_rows, keep), 80)))[:, 0]
    assert torch.equal(rows, torch.arange(1000.0).repeat(2))


def test_keeping_in_memory_runs_the_models_once() -> None:
    passes = 0

    def count() -> Iterator[PairedRows]:
        nonlocal passes
        passes += 1
        return marked_rows(2)

    list(islice(epochs(count, keep_in_memory=True), 10))
    assert passes == 1
    list(islice(epochs(count, keep_in_memory=False), 10))
    assert passes == 1 + 5


@pytest.mark.parametrize("keep", [True, False])
def test_a_text_without_a_pair_is_an_error_not_an_endless_loop(keep: bool) -> None:
    empty = PairedRows(torch.empty(0, 3), torch.empty(0).long(), torch.empty(0).long())
    with pytest.raises(ValueError, match="no paired position"):
        next(epochs(lambda: iter([empty]), keep))
