"""Sources of text -> batches of contexts: mixed by weight, cut to size, of like length, and resumable."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

from sae_lens_dfc.alignment import Coverage, pack
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.sources import Source, aligned_pieces
from sae_lens_dfc.texts import Place

Part = Literal["training", "held_out", "all"]

# Batches among which contexts are sorted by length: at 64, padding is a few percent of any text seen so far.
POOL_BATCHES = 64


@dataclass
class PairCounts:
    """What became of the text: tokens paired or not, and pairs used or not."""

    coverage: Coverage = field(default_factory=Coverage)
    texts: int = 0
    """Documents read."""
    pairs: int = 0
    """Pairs of activations handed on."""
    first_position: int = 0
    """Pairs left out because one of the two stands at position 0 of its context."""
    outlier: int = 0
    """Pairs left out because one norm is above `outlier_factor` times its model's median."""
    outlier_a: int = 0
    """Of these, those in which model A's norm is."""
    outlier_b: int = 0
    """Of these, those in which model B's norm is."""
    not_finite: int = 0
    """Pairs left out because an activation is NaN or infinite."""

    def add(self, other: "PairCounts") -> None:
        """Count another part of the text in."""
        for name, value in vars(other).items():
            if name == "coverage":
                self.coverage.add(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**vars(self), "coverage": self.coverage.to_dict()}

    def load(self, values: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        vars(self).update({**values, "coverage": Coverage.from_dict(values["coverage"])})


class Context(NamedTuple):
    """A stretch of one document that both models read at once."""

    segments: Segments
    """The first is the pair's `bos_segment`; each other ends in a pair."""
    number: int
    """Its number in the stream, from 0."""
    document: int
    """Number of its document in the stream, from 0."""


class ContextBatch(NamedTuple):
    """Contexts for one forward pass."""

    contexts: Sequence[Context]
    after: Place
    """Where the next batch begins."""


class ContextStream:
    """Contexts of several sources, each source as large a share of the pairs as its weight says.

    The next document is of the source that is furthest behind its share. A pass ends when that source
    has ended, or with `n_pairs`. Contexts come in batches of like length, so that little is padding; the
    order of batches is drawn from `seed`.

    Args:
        pair: The two models.
        sources: The data sets.
        context_size: Tokens in a context, in either model.
        batch_size_prompts: Contexts of that size in one batch; of shorter ones there are more.
        part: Which documents: each `held_out_every`-th of a source is held out.
        held_out_every: See `part`.
        n_pairs: At most so many pairs.
        seed: Of the order of batches.
    """

    def __init__(
        self,
        pair: ModelPair,
        sources: Sequence[Source],
        context_size: int,
        batch_size_prompts: int = 16,
        part: Part = "all",
        held_out_every: int = 10,
        n_pairs: int | None = None,
        seed: int = 0,
    ):
        self.pair = pair
        self.sources = sources
        self.context_size = context_size
        self.batch_size_prompts = batch_size_prompts
        self.part = part
        self.held_out_every = held_out_every
        self.n_pairs = n_pairs
        self.seed = seed

    def batches(self, counts: PairCounts, place: Place | None = None) -> Iterator[ContextBatch]:
        """The batches from a place on; `counts` takes what became of the text, earlier batches' included."""
        reading = _Reading(self, counts, place)
        done = 0 if place is None else int(place["batches"])
        while True:
            start = reading.place()
            pool = reading.pool()
            if not pool:
                return
            batches = bucketed(
                pool, self.batch_size_prompts, self.context_size, f"{self.seed} {pool[0].number}"
            )
            for i in range(done, len(batches)):
                last = i + 1 == len(batches)
                yield ContextBatch(
                    batches[i], reading.place() if last else {**start, "batches": i + 1}
                )
            done = 0

    def is_read(self, document: int) -> bool:
        """Whether a source's document of this number, from 0, is of the part that is read."""
        is_held_out = (document + 1) % self.held_out_every == 0
        return self.part == "all" or is_held_out == (self.part == "held_out")


class _Reading:
    """One pass over the sources: what is read so far, and how to go on."""

    def __init__(self, stream: ContextStream, counts: PairCounts, place: Place | None):
        n = len(stream.sources)
        place = place or {
            "rows": [None] * n,
            "documents": [0] * n,
            "pairs": [0] * n,
            "contexts": 0,
            "coverage": Coverage().to_dict(),
            "texts": 0,
        }
        self.stream = stream
        self.counts = counts
        self.rows: list[Place | None] = list(place["rows"])
        self.documents: list[int] = list(place["documents"])
        self.pairs: list[int] = list(place["pairs"])
        self.n_contexts = int(place["contexts"])
        counts.coverage, counts.texts = Coverage.from_dict(place["coverage"]), int(place["texts"])
        self.readers = [s.read(p) for s, p in zip(stream.sources, self.rows, strict=True)]

    def place(self) -> Place:
        return {
            "rows": list(self.rows),
            "documents": list(self.documents),
            "pairs": list(self.pairs),
            "contexts": self.n_contexts,
            "coverage": self.counts.coverage.to_dict(),
            "texts": self.counts.texts,
            "batches": 0,
        }

    def pool(self) -> list[Context]:
        """Contexts of the next whole documents, enough for `POOL_BATCHES` batches; none at the end."""
        size = POOL_BATCHES * self.stream.batch_size_prompts
        pool: list[Context] = []
        while len(pool) < size and self.n_left() > 0:
            document = self.next_document()
            if document is None:
                break
            pool += document
        return pool

    def n_left(self) -> float:
        n_pairs = self.stream.n_pairs
        return float("inf") if n_pairs is None else n_pairs - sum(self.pairs)

    def next_document(self) -> list[Context] | None:
        """The contexts of the next document that is of the part; none when its source has ended."""
        behind = [n / s.cfg.weight for n, s in zip(self.pairs, self.stream.sources, strict=True)]
        which = behind.index(min(behind))
        for document, self.rows[which] in self.readers[which]:
            self.documents[which] += 1
            if self.stream.is_read(self.documents[which] - 1):
                return list(self.contexts(which, document))
        return None

    def contexts(self, which: int, document: Any) -> Iterator[Context]:
        stream, counts = self.stream, self.counts
        number = counts.texts
        counts.texts += 1
        for segments, coverage in aligned_pieces(
            stream.pair, document, stream.sources[which].cfg.tokenizer
        ):
            counts.coverage.add(coverage)
            for packed in pack(segments, stream.context_size - 1, counts.coverage):
                if self.n_left() <= 0:
                    return
                kept = packed[: int(min(self.n_left(), len(packed)))]
                yield Context(kept.after(stream.pair.bos_segment), self.n_contexts, number)
                self.n_contexts += 1
                self.pairs[which] += len(kept)


def bucketed(
    contexts: Sequence[Context], batch_size_prompts: int, context_size: int, seed: str
) -> list[list[Context]]:
    """Contexts of like length together, in batches of at most `batch_size_prompts * context_size` tokens, padding too.

    >>> from sae_lens_dfc.segments import Segment
    >>> texts = [Segments.of([Segment((1,) * n, (1,))]) for n in (1, 4, 2, 4, 1)]
    >>> contexts = [Context(text, number, document=0) for number, text in enumerate(texts)]
    >>> sorted(len(batch) for batch in bucketed(contexts, 2, 4, seed=""))
    [2, 3]
    """
    batches: list[list[Context]] = []
    longest = 0
    for context in sorted(contexts, key=_length, reverse=True):
        if not batches or (len(batches[-1]) + 1) * longest > batch_size_prompts * context_size:
            batches.append([])
            longest = max(1, _length(context))
        batches[-1].append(context)
    # From long to short, rows of like position in their context would be shuffled among themselves.
    random.Random(seed).shuffle(batches)
    return batches


def _length(context: Context) -> int:
    return context.segments.n_tokens


def in_order(batches: Iterable[ContextBatch]) -> list[Segments]:
    """The contexts by their numbers."""
    contexts = chain.from_iterable(batch.contexts for batch in batches)
    return [context.segments for context in sorted(contexts, key=lambda context: context.number)]
