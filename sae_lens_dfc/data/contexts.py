"""Packs aligned text into contexts, mixes data sets by weight, and batches contexts of similar
length; resumable."""

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.alignment.align import Coverage, pack
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import AlignedDocument, Source
from sae_lens_dfc.data.text.datasets import RowsState

logger = logging.getLogger(__name__)

Part = Literal["training", "held_out", "all"]

# Batches among which contexts are sorted by length; with 64, padding was a few percent of every
# text tried.
POOL_BATCHES = 64


@dataclass
class PairCounts:
    """Counts of documents read, tokens paired and pairs used, and of those left out, by reason."""

    coverage: Coverage = field(default_factory=Coverage)
    texts: int = 0
    """Documents read."""
    unreadable: int = 0
    """Documents among these that were skipped because they could not be read."""
    empty: int = 0
    """Documents among these that were empty: null, or without any character, message or token
    id."""
    pairs: int = 0
    """Pairs of activations that were used."""
    first_position: int = 0
    """Pairs dropped because either token is at position 0 of its context."""
    outlier: int = 0
    """Pairs dropped because either norm exceeds `outlier_factor` times its model's running
    median."""
    outlier_a: int = 0
    """Pairs among these in which model A's norm does."""
    outlier_b: int = 0
    """Pairs among these in which model B's norm does."""
    not_finite: int = 0
    """Pairs dropped because an activation is NaN or infinite."""
    not_finite_a: int = 0
    """Pairs among these in which model A's is."""
    not_finite_b: int = 0
    """Pairs among these in which model B's is."""

    def add(self, other: "PairCounts") -> None:
        """Add the counts of another part of the text."""
        for name, value in vars(other).items():
            if name == "coverage":
                self.coverage.add(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        return {**vars(self), "coverage": self.coverage.to_dict()}


class Context(NamedTuple):
    """A stretch of one document that both models read in one context."""

    segments: Segments
    """The first is the pair's `bos_segment`; every other segment ends in a pair."""
    number: int
    """Its number in the stream, from 0."""
    document: int
    """Number of its document in its source, or in this rank's share of it, from 0."""
    source: int = 0
    """Number of its source, from 0."""
    group: str = ""
    """Name of its document's group: its source, or a value of a column."""


class ContextBatch(NamedTuple):
    """Contexts for one forward pass."""

    contexts: Sequence[Context]
    after: RowsState
    """Position of the next batch."""


@dataclass
class ContextStream:
    """Contexts from several sources, mixed so that each source's share of the pairs is proportional
    to its weight.

    The next context comes from the source that is furthest behind its share. A pass ends when that
    source is exhausted (in all ranks' shares), or after `n_pairs` pairs. Contexts of similar length
    are batched together to reduce padding, and batches are shuffled with `seed`.
    """

    pair: ModelPair
    sources: Sequence[Source]
    context_size: int
    """Tokens in a context, in either model."""
    batch_size_prompts: int = 16
    """Contexts of `context_size` tokens per batch; more if they are shorter."""
    part: Part = "all"
    """Which documents to read: every `eval_every_n_documents`-th of a source is held out."""
    eval_every_n_documents: int = 10
    n_pairs: int | None = None
    """Maximum number of pairs."""
    seed: int = 0
    """Seed of the order of batches."""

    def batches(self, counts: PairCounts, place: RowsState | None = None) -> Iterator[ContextBatch]:
        """The batches from a position on; `counts` is updated in place and includes earlier
        batches.

        Raises:
            ValueError: The position does not exist in this text.
        """
        try:
            reading = _Reading(self, counts, place)
            done = 0 if place is None else int(place["batches"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if place is None:
                raise
            raise ValueError(
                f"The position to resume from is not in this text: {said_by(error)} Start anew, or resume with the original text."
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
        """Whether the document with this number in its source, from 0, belongs to the part that is
        read."""
        is_held_out = (document + 1) % self.eval_every_n_documents == 0
        return self.part == "all" or is_held_out == (self.part == "held_out")


class _Reading(Iterator[Context]):
    """One pass over the sources, context by context."""

    def __init__(self, stream: ContextStream, counts: PairCounts, place: RowsState | None):
        self.stream = stream
        self.counts = counts
        places = [None] * len(stream.sources) if place is None else place["sources"]
        self.n_contexts = 0 if place is None else int(place["contexts"])
        self.sources = [
            _SourceReading(source, stream, p)
            for source, p in zip(stream.sources, places, strict=True)
        ]

    def place(self) -> RowsState:
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
        self.counts.empty = sum(source.n_empty for source in self.sources)

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
        document = source.n_documents - 1
        return Context(segments.after(bos), number, document, which, source.group)

    def next_source(self) -> "_SourceReading | None":
        """The source to read next, with a context ready; None if it is exhausted."""
        ended: list[_SourceReading] = []
        for source in sorted(self.sources, key=lambda s: s.n_pairs / s.source.cfg.weight):
            while not source.has_context() and source.open_next():
                pass
            if source.has_context():
                return source
            ended.append(source)
            # The ranks' shares of one data set end one by one.
            if not any(s.source.cfg is source.source.cfg for s in self.sources if s not in ended):
                return None
        return None


class _SourceReading:
    """Reading state of one source: completed documents, and the number of contexts taken from the
    open one."""

    def __init__(self, source: Source, stream: ContextStream, place: RowsState | None):
        self.source = source
        self.stream = stream
        self.before: RowsState | None = None
        """Position of the open document, whose contexts are recomputed on resume."""
        self.n_before = self.n_read = self.n_unreadable = self.n_taken = self.n_pairs = 0
        self.n_empty = 0
        self.has_ended = False
        self.group = ""
        """Group of the open document."""
        self.coverage_before, self.coverage = Coverage(), Coverage()
        n_taken = 0
        if place is not None:
            self.before, self.n_before = place["before"], place["n_before"]
            self.n_pairs, n_taken = place["n_pairs"], place["n_taken"]
            self.n_read, self.n_unreadable = place["n_read"], place["n_unreadable"]
            self.n_empty = place.get("n_empty", 0)  # checkpoints of earlier versions have none
            self.coverage_before = from_plain(Coverage, place["coverage_before"], "Its coverage")
            self.coverage = deepcopy(self.coverage_before)
        self.documents = source.read_aligned(stream.pair, self.before)
        self.n_documents = self.n_before
        self.contexts: Iterator[Segments] = iter(())
        self.ahead: Segments | None = None
        if place is not None and place["is_open"]:
            self.open_next()
            for _ in range(n_taken):
                if not self.has_context():
                    raise ValueError(f"its document has no {n_taken} contexts.")
                self.ahead = None
            self.n_taken = n_taken

    def place(self) -> RowsState:
        is_open = self.n_documents > self.n_before
        return {
            "before": self.before,
            "n_before": self.n_before,
            "is_open": is_open,
            # Resuming opens the document again, which counts it.
            "n_read": self.n_read - is_open,
            "n_unreadable": self.n_unreadable,
            "n_empty": self.n_empty,
            "n_taken": self.n_taken,
            "n_pairs": self.n_pairs,
            "coverage_before": self.coverage_before.to_dict(),
        }

    def open_next(self) -> bool:
        """Open the next document of the part, if there is one."""
        for document in self.documents:
            self.n_documents += 1
            if self.stream.is_read(self.n_documents - 1):
                self.n_read += 1
                self.contexts, self.group = self.contexts_of(document), document.group
                return True
            self.before, self.n_before = document.after, self.n_documents
        self.has_ended = True
        if self.stream.part != "held_out":
            self.source.check_empty(self.n_empty, self.n_read)
        return False

    def contexts_of(self, document: AlignedDocument) -> Iterator[Segments]:
        self.n_empty += document.is_empty
        try:
            for segments, coverage in document.pieces:
                self.coverage.add(coverage)
                yield from pack(segments, self.stream.context_size - 1, self.coverage)
        except ValueError as error:
            self.n_unreadable += 1
            number = self.n_documents - 1
            self.source.check_unreadable(self.n_unreadable, self.n_read, number, error)
        self.before, self.n_before, self.n_taken = document.after, self.n_documents, 0
        self.coverage_before = deepcopy(self.coverage)

    def has_context(self) -> bool:
        """Whether the open document has another context."""
        if self.ahead is None:
            self.ahead = next(self.contexts, None)
        return self.ahead is not None

    def take(self, n_left: int) -> Segments:
        """Return the next context, cut to `n_left` pairs."""
        assert self.ahead is not None
        taken, self.ahead = self.ahead[:n_left], None
        self.n_taken, self.n_pairs = self.n_taken + 1, self.n_pairs + len(taken)
        return taken


def bucketed(
    contexts: Sequence[Context], batch_size_prompts: int, context_size: int, seed: str
) -> list[list[Context]]:
    """Group contexts of similar length into batches of at most `batch_size_prompts * context_size`
    tokens, including padding.

    >>> from sae_lens_dfc.data.alignment.segments import Segment
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
    # In order of length, the shuffle buffer would mix only rows from similar positions.
    random.Random(seed).shuffle(batches)
    return batches


def _lengths(context: Context) -> tuple[int, int]:
    # Most contexts are full in one model; their length in the other decides its padding.
    segments = context.segments
    return segments.n_tokens, len(segments.ids_a) - len(segments.ids_b)


def in_order(batches: Iterable[ContextBatch]) -> list[Context]:
    """The contexts sorted by number."""
    contexts = chain.from_iterable(batch.contexts for batch in batches)
    return sorted(contexts, key=lambda context: context.number)
