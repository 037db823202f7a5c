"""Shuffles paired activations into batches: a resumable `DataProvider` for SAELens' trainer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from jaxtyping import Float
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from sae_lens_dfc.core.interrupts import GracefulShutdown, close_soon
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.activations import PairedRows, StatefulBatch, StreamState

StartRows = Callable[[StreamState | None], Iterator[PairedRows]]
"""Starts a pass over the text at a state, or at the beginning if it is None."""


def epochs(start_rows: StartRows, start: StreamState | None = None) -> Iterator[StatefulBatch]:
    """Repeat the activations of the text without end, running the models in every epoch.

    Raises:
        ValueError: A pass over the whole text yields no pair.
    """
    first = 0 if start is None else start.number("epoch")
    for epoch in count(first):
        for row in _not_empty(start_rows(start), is_whole=start is None):
            after = StreamState({**row.after.values, "epoch": epoch}, row.after.tensors)
            yield StatefulBatch(row.acts, after)
        start = None


def epochs_in_memory(
    start_rows: StartRows, start: StreamState | None = None
) -> Iterator[StatefulBatch]:
    """Repeat the activations of the text without end, keeping those of the first epoch in memory;
    resuming recomputes the first epoch.

    Raises:
        ValueError: The first epoch yields no pair.
    """
    done = 0 if start is None else start.number("done")
    memory: list[Tensor] = []
    for i, rows in enumerate(_not_empty(start_rows(None)), start=1):
        memory.append(rows.acts.cpu())
        if i > done:
            yield StatefulBatch(memory[-1], StreamState({"done": i}))
    for i in count(max(done, len(memory))):
        yield StatefulBatch(memory[i % len(memory)], StreamState({"done": i + 1}))


def _not_empty(rows: Iterator[PairedRows], is_whole: bool = True) -> Iterator[PairedRows]:
    empty = True
    for batch in rows:
        if len(batch.acts) > 0:
            empty = False
            yield batch
    if empty and is_whole:
        raise ValueError(
            "The text has no paired position: the two tokenizers end no token at the same character (after position 0). "
            "Check the text and the tokenizers with `sae-lens-dfc align`."
        )


def shuffled(
    start_rows: Callable[[StreamState | None], Iterator[StatefulBatch]],
    batch_size: int,
    buffer_size: int,
    mix_fraction: float = 0.5,
    seed: int = 0,
    start: StreamState | None = None,
) -> Iterator[StatefulBatch]:
    """Shuffle rows into batches; a row keeps both models' activations.

    It mixes as SAELens' `mixing_buffer` does, whose state cannot be saved, because it keeps its
    rows inside a generator and uses torch's global random number generator; it also copies its
    whole buffer at each new batch of rows.

    Args:
        start_rows: Starts the rows in the order of the text at a state, or at the beginning if it
            is None.
        batch_size: Rows per batch.
        buffer_size: Rows in the shuffle buffer.
        mix_fraction: Share of the buffer kept for mixing at each refill; 0 does not shuffle.
        seed: Seed of the shuffle.
        start: State to resume from, if not at the beginning.

    Raises:
        ValueError: The buffer is smaller than a batch, or the fraction is outside [0, 1).
    """
    if buffer_size < batch_size or not 0 <= mix_fraction < 1:
        raise ValueError(
            f"A shuffle needs a buffer of at least one batch and a mixing fraction in [0, 1), got {buffer_size} rows for "
            f"batches of {batch_size} and a fraction of {mix_fraction}."
        )
    draws = torch.Generator().manual_seed(seed)
    buffer: Tensor | None = None
    upstream: StreamState | None = None
    to_serve = 0
    if start is not None:
        buffer, to_serve, upstream = _resumed(draws, start, batch_size)
    rows = start_rows(upstream)
    while True:
        while buffer is not None and upstream is not None and to_serve > 0:
            batch, buffer = buffer[:batch_size], buffer[batch_size:]
            to_serve -= 1
            tensors = {**upstream.tensors, "buffer": buffer, "draws": draws.get_state()}
            yield StatefulBatch(
                batch, StreamState({"to_serve": to_serve, "rows": upstream.values}, tensors)
            )
        chunks, upstream = _filled(buffer, rows, buffer_size)
        if upstream is None:
            return
        buffer = _shuffled(chunks, draws) if mix_fraction > 0 else torch.cat(chunks)
        del chunks
        to_serve = max(1, (len(buffer) - int(buffer_size * mix_fraction)) // batch_size)


def _resumed(
    draws: torch.Generator, start: StreamState, batch_size: int
) -> tuple[Tensor, int, StreamState]:
    """Restore the buffer, the number of batches left in it and the state of the rows upstream; also
    restores `draws`.

    Raises:
        ValueError: The state is not that of a shuffle into batches of this size.
    """
    tensors, rows, to_serve = (
        dict(start.tensors),
        start.values.get("rows"),
        start.number("to_serve"),
    )
    try:
        draws.set_state(tensors.pop("draws"))
        buffer = tensors.pop("buffer")
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The state to resume from has no shuffle buffer: {said_by(error)}"
        ) from error
    if buffer.ndim != 2 or to_serve * batch_size > len(buffer) or not isinstance(rows, dict):
        raise ValueError(
            f"The state to resume from has a shuffle buffer of shape {tuple(buffer.shape)} for {to_serve} batches of "
            f"{batch_size} rows, and {rows!r:.80} as its position in the text."
        )
    return buffer, to_serve, StreamState(rows, tensors)


def _filled(
    buffer: Tensor | None, rows: Iterator[StatefulBatch], size: int
) -> tuple[list[Tensor], StreamState | None]:
    """The buffer and new rows, at least `size` in total, and the state after them; no state if the
    rows end earlier."""
    chunks = [] if buffer is None else [buffer]
    for chunk, after in rows:
        # The buffer takes gigabytes, so it is kept off the models' device; a checkpoint's is
        # restored to the CPU too.
        chunks.append(chunk.cpu())
        if sum(map(len, chunks)) >= size:
            return chunks, after
    return [], None


def _shuffled(
    chunks: Sequence[Float[Tensor, "_ d_in"]], draws: torch.Generator
) -> Float[Tensor, "n d_in"]:
    """Permute the rows of all chunks at random, copying each row once."""
    n = sum(map(len, chunks))
    # The inverse permutation: the place of each row.
    places = torch.randperm(n, generator=draws).argsort()
    buffer = chunks[0].new_empty(n, *chunks[0].shape[1:])
    for chunk, its_places in zip(chunks, places.split([len(c) for c in chunks]), strict=True):
        buffer[its_places] = chunk
    return buffer


class Batches(Iterator[Tensor]):
    """Batches as SAELens' trainer expects them; `after` is the state to resume from after the last
    one.

    Args:
        marked: The batches with their states.
        prefetch: Number of batches prefetched in a thread; 0 computes each on demand.
        start: State at which they begin, if not at the start.
        stop: Shutdown request to check before each batch.

    Raises:
        Interrupted: `stop` received a signal.
    """

    def __init__(
        self,
        marked: Iterator[StatefulBatch],
        prefetch: int,
        start: StreamState | None = None,
        stop: GracefulShutdown | None = None,
    ):
        self._stop = stop or GracefulShutdown()
        self._marked = PrefetchingIterator(marked, prefetch) if prefetch > 0 else marked
        self.after = start
        """State to resume from; None before the first batch."""

    def __next__(self) -> Tensor:
        with self._stop.waiting():
            marked = next(self._marked)
        # Outside the block: a batch whose wait is interrupted must be yielded again on resume.
        batch, self.after = marked
        return batch

    def close(self) -> None:
        """Stop the prefetch thread, which would otherwise wait for its next batch to be
        consumed."""
        if not isinstance(self._marked, PrefetchingIterator):
            return
        if self._stop.number:
            close_soon(self._marked)
        else:
            # The caller may run the models next, and their hooks are not thread-safe.
            self._marked.close()
