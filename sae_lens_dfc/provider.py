"""Rows of paired activations -> shuffled batches: the `DataProvider` that SAELens' trainer takes."""

from collections.abc import Callable, Iterator
from itertools import cycle

from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from sae_lens_dfc.activations import PairedRows


def epochs(make_rows: Callable[[], Iterator[PairedRows]], keep_in_memory: bool) -> Iterator[Tensor]:
    """Activations of the same text again and again.

    Args:
        make_rows: Starts one pass over the text.
        keep_in_memory: Keep the first pass's activations and repeat those, rather than run both models anew.

    Raises:
        ValueError: A pass gave no pair at all.
    """
    if keep_in_memory:
        yield from cycle(acts.cpu() for acts in _at_least_one(make_rows()))
    while True:
        yield from _at_least_one(make_rows())


def _at_least_one(rows: Iterator[PairedRows]) -> Iterator[Tensor]:
    empty = True
    for batch in rows:
        if len(batch.acts) > 0:
            empty = False
            yield batch.acts
    if empty:
        raise ValueError(
            "The text has no paired position: at no character do both tokenizers end a token (after position 0). "
            "Check the text and the tokenizers with `sae-lens-dfc align`."
        )


def shuffled_batches(
    acts: Iterator[Tensor],
    batch_size: int,
    buffer_size: int,
    mix_fraction: float = 0.5,
    prefetch: int = 1,
) -> Iterator[Tensor]:
    """Shuffled batches of rows; a row's two models stay together. Close it when it is a `PrefetchingIterator`.

    Args:
        acts: Rows of activations in the order of the text.
        batch_size: Rows in a batch.
        buffer_size: Rows among which the shuffle draws.
        mix_fraction: Share of the buffer kept back at each draw, see SAELens' `mixing_buffer`.
        prefetch: Batches made ahead in a thread; 0 makes them when they are asked for.
    """
    batches = mixing_buffer(buffer_size, batch_size, acts, mix_fraction)
    return PrefetchingIterator(batches, prefetch) if prefetch > 0 else batches
