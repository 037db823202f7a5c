"""Sources of text -> batches of contexts: mixed by weight, cut to size, of like length, and resumable."""

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from sae_lens_dfc.alignment import Coverage, pack
from sae_lens_dfc.files import from_plain
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.sources import Source, aligned_pieces
from sae_lens_dfc.texts import Place

logger = logging.getLogger(__name__)

Part = Literal["training", "held_out", "all"]

# Batches among which contexts are sorted by length: at 64, padding is a few percent of any text seen so far.
POOL_BATCHES = 64


@dataclass
class PairCounts:
    """What became of the text: tokens paired or not, and pairs used or not."""

    coverage: Coverage = field(default_factory=Coverage)
    texts: int = 0
    """Documents read."""
    unreadable: int = 0
    """Of these, those left out since they could not be read."""
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

    def load(self, values: Any) -> None:
        """Take over what `to_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"The counts must be a mapping, got {values!r:.80}.")
        coverage = Coverage.from_dict(values.get("coverage"))
        vars(self).update(
            vars(from_plain(PairCounts, {**values, "coverage": coverage}, "The counts"))
        )


class Context(NamedTuple):
    """A stretch of one document that both models read at once."""

    segments: Segments
    """The first is the pair's `bos_segment`; each other ends in a pair."""
    number: int
    """Its number in the stream, from 0."""
    document: int
    """Number of its document in its source, or in this process's share of it, from 0."""
    source: int = 0
    """Number of its source, from 0."""


class ContextBatch(NamedTuple):
    """Contexts for one forward pass."""

    contexts: Sequence[Context]
    after: Place
    """Where the next batch begins."""


class ContextStream:
    """Contexts of several sources, each source as large a share of the pairs as its weight says.

    The next context is of the source that is furthest behind its share. A pass ends when that source
    (all shares of it, where several processes have read it) has ended, or with `n_pairs`. Contexts
    come in batches of like length, so that little is padding; the order of batches is drawn from `seed`.

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
        """The batches from a place on; `counts` takes what became of the text, earlier batches' included.

        Raises:
            ValueError: There is no such place in this text.
        """
        try:
            reading = _Reading(self, counts, place)
            done = 0 if place is None else int(place["batches"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if place is None:
                raise
            raise ValueError(
                f"The place to go on from is none of this text: {error!r}. Begin anew, or go on with the text it was of."
            ) from error
        while True:
            start = reading.place()
            pool = list(islice(reading, POOL_BATCHES * self.batch_size_prompts))
            reading.count()
            if not pool:
                reading.say_why_it_ended()
                return
            seed = f"{self.seed} {pool[0].number}"
            batches = bucketed(pool, self.batch_size_prompts, self.context_size, seed)
            for i in range(done, len(batches)):
                last = i + 1 == len(batches)
                after = reading.place() if last else {**start, "batches": i + 1}
                yield ContextBatch(batches[i], after)
            done = 0

    def is_read(self, document: int) -> bool:
        """Whether a source's document of this number, from 0, is of the part that is read."""
        is_held_out = (document + 1) % self.held_out_every == 0
        return self.part == "all" or is_held_out == (self.part == "held_out")


class _Reading(Iterator[Context]):
    """One pass over the sources, context by context."""

    def __init__(self, stream: ContextStream, counts: PairCounts, place: Place | None):
        self.stream = stream
        self.counts = counts
        places = [None] * len(stream.sources) if place is None else place["sources"]
        self.n_contexts = 0 if place is None else int(place["contexts"])
        self.sources = [
            _SourceReading(source, stream, p)
            for source, p in zip(stream.sources, places, strict=True)
        ]

    def place(self) -> Place:
        return {
            "sources": [source.place() for source in self.sources],
            "contexts": self.n_contexts,
            "batches": 0,
        }

    def count(self) -> None:
        coverage = Coverage()
        for source in self.sources:
            coverage.add(source.coverage)
        self.counts.coverage = coverage
        self.counts.texts = sum(source.n_read for source in self.sources)
        self.counts.unreadable = sum(source.n_unreadable for source in self.sources)

    def say_why_it_ended(self) -> None:
        ended = [s for s in self.sources if s.has_ended]
        wanted = self.stream.n_pairs
        if self.n_left() > 0 and (wanted is not None or len(ended) < len(self.sources)):
            read = ", ".join(f"{s.source.cfg.dataset_path}: {s.n_pairs}" for s in self.sources)
            names = ", ".join(s.source.cfg.dataset_path for s in ended)
            logger.warning(
                "The pass ends before the %s, since %s has ended. Pairs read: %s",
                *(f"{wanted} pairs asked for" if wanted else "other sources", names, read),
            )

    def n_left(self) -> int:
        n_pairs = self.stream.n_pairs
        return sys.maxsize if n_pairs is None else n_pairs - sum(s.n_pairs for s in self.sources)

    @override
    def __next__(self) -> Context:
        n_left = self.n_left()
        source = self.next_source() if n_left > 0 else None
        if source is None:
            raise StopIteration
        segments = source.take(n_left)
        number, self.n_contexts = self.n_contexts, self.n_contexts + 1
        which = self.sources.index(source)
        bos = self.stream.pair.bos_segment
        return Context(segments.after(bos), number, source.n_documents - 1, which)

    def next_source(self) -> "_SourceReading | None":
        """The source whose turn it is, with a context ready; none when that one has ended."""
        ended: list[_SourceReading] = []
        for source in sorted(self.sources, key=lambda s: s.n_pairs / s.source.cfg.weight):
            while not source.has_context() and source.open_next():
                pass
            if source.has_context():
                return source
            ended.append(source)
            # Several processes' shares of one data set end one by one.
            if not any(s.source.cfg is source.source.cfg for s in self.sources if s not in ended):
                return None
        return None


class _SourceReading:
    """One source as far as it is read: whole documents, and so many contexts of the one after them."""

    def __init__(self, source: Source, stream: ContextStream, place: Place | None):
        self.source = source
        self.stream = stream
        self.before: Place | None = None
        """The place of the document that is open; its contexts are made again when reading goes on from here."""
        self.n_before = self.n_read = self.n_unreadable = self.n_taken = self.n_pairs = 0
        self.has_ended = False
        self.coverage_before, self.coverage = Coverage(), Coverage()
        n_taken = 0
        if place is not None:
            self.before, self.n_before = place["before"], place["n_before"]
            self.n_pairs, n_taken = place["n_pairs"], place["n_taken"]
            self.n_read, self.n_unreadable = place["n_read"], place["n_unreadable"]
            self.coverage_before = Coverage.from_dict(place["coverage_before"])
            self.coverage = Coverage.from_dict(place["coverage_before"])
        self.rows = source.read(self.before)
        self.n_documents = self.n_before
        self.contexts: Iterator[Segments] = iter(())
        self.ahead: Segments | None = None
        if place is not None and place["is_open"]:
            self.open_next()
            for _ in range(n_taken):
                if not self.has_context():
                    raise ValueError(f"its document has no {n_taken} contexts")
                self.ahead = None
            self.n_taken = n_taken

    def place(self) -> Place:
        is_open = self.n_documents > self.n_before
        return {
            "before": self.before,
            "n_before": self.n_before,
            "is_open": is_open,
            # The open document is counted when it is opened again.
            "n_read": self.n_read - is_open,
            "n_unreadable": self.n_unreadable,
            "n_taken": self.n_taken,
            "n_pairs": self.n_pairs,
            "coverage_before": self.coverage_before.to_dict(),
        }

    def open_next(self) -> bool:
        """Open the next document that is of the part, if there is one."""
        for document, after in self.rows:
            self.n_documents += 1
            if self.stream.is_read(self.n_documents - 1):
                self.n_read += 1
                self.contexts = self.contexts_of(document, after)
                return True
            self.before, self.n_before = after, self.n_documents
        self.has_ended = True
        return False

    def contexts_of(self, document: Any, after: Place) -> Iterator[Segments]:
        stream = self.stream
        pieces = aligned_pieces(stream.pair, document, self.source.cfg.tokenizer)
        try:
            for segments, coverage in pieces:
                self.coverage.add(coverage)
                yield from pack(segments, stream.context_size - 1, self.coverage)
        except ValueError as error:
            self.n_unreadable += 1
            self.source.check_unreadable(self.n_unreadable, self.n_read, error)
        self.before, self.n_before, self.n_taken = after, self.n_documents, 0
        self.coverage_before = deepcopy(self.coverage)

    def has_context(self) -> bool:
        """Whether the open document has another context."""
        if self.ahead is None:
            self.ahead = next(self.contexts, None)
        return self.ahead is not None

    def take(self, n_left: int) -> Segments:
        """That context, cut to `n_left` pairs."""
        assert self.ahead is not None
        taken, self.ahead = self.ahead[:n_left], None
        self.n_taken, self.n_pairs = self.n_taken + 1, self.n_pairs + len(taken)
        return taken


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
    for context in sorted(contexts, key=_lengths, reverse=True):
        if not batches or (len(batches[-1]) + 1) * longest > batch_size_prompts * context_size:
            batches.append([])
            longest = max(1, context.segments.n_tokens)
        batches[-1].append(context)
    # From long to short, rows of like position in their context would be shuffled among themselves.
    random.Random(seed).shuffle(batches)
    return batches


def _lengths(context: Context) -> tuple[int, int]:
    # Most contexts are full in one model; how much shorter they are in the other decides its padding.
    segments = context.segments
    return segments.n_tokens, len(segments.ids_a) - len(segments.ids_b)


def in_order(batches: Iterable[ContextBatch]) -> list[Context]:
    """The contexts by their numbers."""
    contexts = chain.from_iterable(batch.contexts for batch in batches)
    return sorted(contexts, key=lambda context: context.number)
