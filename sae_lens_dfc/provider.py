"""Rows of paired activations -> shuffled batches: the `DataProvider` that SAELens' trainer takes, able to resume."""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from sae_lens_dfc.activations import Bookmark, Marked, PairedRows
from sae_lens_dfc.stopping import Stop, close_soon

StartRows = Callable[[Bookmark | None], Iterator[PairedRows]]
"""Starts a pass over the text, at a place or, with none, at the beginning."""


def epochs(start_rows: StartRows, start: Bookmark | None = None) -> Iterator[Marked]:
    """Activations of the same text again and again, the models run anew in each pass.

    Raises:
        ValueError: A pass gave no pair at all.
    """
    first = 0 if start is None else start.number("epoch")
    for epoch in count(first):
        for row in _not_empty(start_rows(start), is_whole=start is None):
            after = Bookmark({**row.after.values, "epoch": epoch}, row.after.tensors)
            yield Marked(row.acts, after)
        start = None


def epochs_in_memory(start_rows: StartRows, start: Bookmark | None = None) -> Iterator[Marked]:
    """The same with the first pass's activations kept and repeated; to resume takes that first pass again.

    Raises:
        ValueError: The pass gave no pair at all.
    """
    done = 0 if start is None else start.number("done")
    memory: list[Tensor] = []
    for i, rows in enumerate(_not_empty(start_rows(None)), start=1):
        memory.append(rows.acts.cpu())
        if i > done:
            yield Marked(memory[-1], Bookmark({"done": i}))
    for i in count(max(done, len(memory))):
        yield Marked(memory[i % len(memory)], Bookmark({"done": i + 1}))


def _not_empty(rows: Iterator[PairedRows], is_whole: bool = True) -> Iterator[PairedRows]:
    empty = True
    for batch in rows:
        if len(batch.acts) > 0:
            empty = False
            yield batch
    if empty and is_whole:
        raise ValueError(
            "The text has no paired position: at no character do both tokenizers end a token (after position 0). "
            "Check the text and the tokenizers with `sae-lens-dfc align`."
        )


def shuffled(
    start_rows: Callable[[Bookmark | None], Iterator[Marked]],
    batch_size: int,
    buffer_size: int,
    mix_fraction: float = 0.5,
    seed: int = 0,
    start: Bookmark | None = None,
) -> Iterator[Marked]:
    """Shuffled batches of rows; a row's two models stay together.

    It draws as SAELens' `mixing_buffer` does. That one keeps its rows inside a generator and draws from
    torch's global random numbers, so where it stands cannot be saved; and it copies its whole buffer at
    each new batch of rows.

    Args:
        start_rows: Starts the rows in the order of the text, at a place or, with none, at the beginning.
        batch_size: Rows in a batch.
        buffer_size: Rows among which the shuffle draws.
        mix_fraction: Share of the buffer kept back at each draw; 0 does not shuffle.
        seed: Of the shuffle.
        start: Where to begin, when not at the beginning.

    Raises:
        ValueError: The buffer is smaller than a batch, or the fraction outside [0, 1).
    """
    if buffer_size < batch_size or not 0 <= mix_fraction < 1:
        raise ValueError(
            f"A shuffle needs a buffer of at least a batch and a mixing fraction in [0, 1), got {buffer_size} rows for "
            f"batches of {batch_size}, and {mix_fraction}."
        )
    draws = torch.Generator().manual_seed(seed)
    buffer: Tensor | None = None
    upstream: Bookmark | None = None
    to_serve = 0
    if start is not None:
        buffer, to_serve, upstream = _resumed(draws, start, batch_size)
    rows = start_rows(upstream)
    while True:
        while buffer is not None and upstream is not None and to_serve > 0:
            batch, buffer = buffer[:batch_size], buffer[batch_size:]
            to_serve -= 1
            tensors = {**upstream.tensors, "buffer": buffer, "draws": draws.get_state()}
            yield Marked(batch, Bookmark({"to_serve": to_serve, "rows": upstream.values}, tensors))
        buffer, upstream = _filled(buffer, rows, buffer_size)
        if upstream is None:
            return
        if mix_fraction > 0:
            order = torch.randperm(len(buffer), generator=draws)
            buffer = buffer.index_select(0, order)
        to_serve = max(1, (len(buffer) - int(buffer_size * mix_fraction)) // batch_size)


def _resumed(
    draws: torch.Generator, start: Bookmark, batch_size: int
) -> tuple[Tensor, int, Bookmark]:
    """Buffer, batches still to be served from it, and the place of its rows; `draws` goes on as it would have.

    Raises:
        ValueError: The place is of something else than a shuffle into such batches.
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
        raise ValueError(f"The place to go on from has no shuffle: {error!r}.") from error
    if buffer.ndim != 2 or to_serve * batch_size > len(buffer) or not isinstance(rows, dict):
        raise ValueError(
            f"The place to go on from has {tuple(buffer.shape)} rows left, and says that they are {to_serve} batches of "
            f"{batch_size}, and come from {rows!r:.80}."
        )
    return buffer, to_serve, Bookmark(rows, tensors)


def _filled(
    buffer: Tensor | None, rows: Iterator[Marked], size: int
) -> tuple[Tensor, Bookmark | None]:
    """The buffer with new rows, at least `size` in all, and the place after them; no place when the rows end before."""
    chunks = [] if buffer is None else [buffer]
    for chunk, after in rows:
        # Gigabytes, which the models' device has better use for; and it is where a checkpoint's come back to.
        chunks.append(chunk.cpu())
        if sum(map(len, chunks)) >= size:
            return torch.cat(chunks), after
    return torch.empty(0), None


class Batches(Iterator[Tensor]):
    """Batches without their marks, as SAELens' trainer takes them; it remembers where the last one handed out ends.

    Args:
        marked: The batches.
        prefetch: Batches made ahead in a thread; 0 makes them when they are asked for.
        start: Where they begin, when not at the beginning.
        stop: What may end them before one is handed out.

    Raises:
        Stopped: `stop` was asked for it.
    """

    def __init__(
        self,
        marked: Iterator[Marked],
        prefetch: int,
        start: Bookmark | None = None,
        stop: Stop | None = None,
    ):
        self._stop = stop or Stop()
        self._marked = PrefetchingIterator(marked, prefetch) if prefetch > 0 else marked
        self.after = start
        """Where the next batch begins; none before the first."""

    def __next__(self) -> Tensor:
        with self._stop.waiting():
            marked = next(self._marked)
        # Not in the block: what is interrupted in it must come again.
        batch, self.after = marked
        return batch

    def close(self) -> None:
        """Stop the thread. Without this it would wait for somebody to take its next batch."""
        if not isinstance(self._marked, PrefetchingIterator):
            return
        if self._stop.number:
            close_soon(self._marked)
        else:
            # Whoever goes on may run the models, and hooks are not made for two threads.
            self._marked.close()
