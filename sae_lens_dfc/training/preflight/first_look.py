"""Reads the first documents of a text before a long training, to measure how many tokens pair, why
others do not, and how many pairs to expect."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset

from sae_lens_dfc.core.terminal import counted
from sae_lens_dfc.data.alignment.align import REASONS, Coverage
from sae_lens_dfc.data.config import DataConfig
from sae_lens_dfc.data.contexts import Context, ContextStream, PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text.datasets import Rows
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

TOP_REASONS = 3
SAMPLED_DOCUMENTS = 64
"""Number of documents whose length is measured, spread over the data set."""
A_MOMENT = 0.5
"""Seconds to read for the log of a training; opening a streamed data set again may take as long."""


class Expected(NamedTuple):
    """An extrapolated number."""

    value: float
    error: float
    """Its standard error: 0 if everything was counted, infinity if only one document was read."""


@dataclass
class FirstLook:
    """Results from the first documents of a data set."""

    dataset_path: str
    """The data set."""
    n_documents: int | None = None
    """Documents in the whole data set, including held-out ones; none if the data set does not
    say."""
    counts: PairCounts = field(default_factory=PairCounts)
    """Counts of the training documents that were read, and of their tokens and pairs."""
    pairs_of: list[int] = field(default_factory=list)
    """Pairs in each document that was read to its end."""
    sizes_of: list[int] = field(default_factory=list)
    """Characters in each of these documents, or 1 for each if the lengths of other documents are
    not available."""
    mean_size: float = 1.0
    """Mean size of a document in the whole data set, estimated from a sample."""
    mean_size_error: float = 0.0
    """Standard error of `mean_size`."""
    is_whole: bool = False
    """Whether all training documents were read."""
    seconds: float = 0.0
    """How long reading took."""
    contexts: list[Context] = field(default_factory=list)
    """The contexts that were read, for the models to run on; empty unless they were to be kept."""

    def expected_pairs(self, eval_every_n_documents: int) -> Expected | None:
        """Estimate the pairs to train on in the whole data set; none if its length is not known.

        The estimate assumes as many pairs per character as in the documents that were read. It uses
        characters because the first documents may be longer or shorter than the others.

        >>> look = FirstLook("mine", n_documents=40, pairs_of=[10, 20], sizes_of=[40, 80], mean_size=100)
        >>> look.expected_pairs(eval_every_n_documents=4)  # 30 documents of 25 pairs
        Expected(value=750.0, error=0.0)
        """
        if self.is_whole:
            return Expected(float(sum(self.pairs_of)), 0.0)
        if self.n_documents is None or not sum(self.sizes_of) or not sum(self.pairs_of):
            return None
        n_read, per_character = len(self.pairs_of), sum(self.pairs_of) / sum(self.sizes_of)
        off = [
            pairs - per_character * size
            for pairs, size in zip(self.pairs_of, self.sizes_of, strict=True)
        ]
        spread = statistics.stdev(off) if n_read > 1 else math.inf
        of_ratio = spread / math.sqrt(n_read) / statistics.mean(self.pairs_of)
        n_training = self.n_documents - self.n_documents // eval_every_n_documents
        value = n_training * self.mean_size * per_character
        return Expected(value, value * math.hypot(of_ratio, self.mean_size_error / self.mean_size))

    def n_held_out(self, eval_every_n_documents: int) -> int | None:
        """Number of documents that are held out; none if the length of the data set is not known.

        >>> FirstLook("mine", n_documents=25).n_held_out(eval_every_n_documents=10)
        2
        """
        return None if self.n_documents is None else self.n_documents // eval_every_n_documents

    def to_dict(self, eval_every_n_documents: int) -> dict[str, Any]:
        """All results except the contexts as plain values, for JSON."""
        expected = self.expected_pairs(eval_every_n_documents)
        return {
            "dataset_path": self.dataset_path,
            "n_documents": self.n_documents,
            "documents_read": self.counts.texts,
            "unreadable": self.counts.unreadable,
            "empty": self.counts.empty,
            "is_whole": self.is_whole,
            "seconds": self.seconds,
            "expected_pairs": None if expected is None else expected.value,
            "expected_pairs_error": None if expected is None else _finite(expected.error),
            **self.counts.coverage.to_dict(),
        }


def look(
    pair: ModelPair, source: Source, cfg: DataConfig, seconds: float, keep_contexts: bool = False
) -> FirstLook:
    """Read the first training documents as a training does, for about the given time.

    Args:
        pair: The two models; their tokenizers are used, the models are not run.
        source: The data set.
        cfg: How it is read.
        seconds: How long to read. Documents that make 64 contexts are always read, however long
            that takes.
        keep_contexts: Whether to keep what was read.

    Raises:
        ValueError: A document cannot be read, and training would stop with this error.
    """
    found = FirstLook(source.cfg.dataset_path, n_documents(source.rows))
    pairs: Counter[int] = Counter()
    stream = _stream(pair, source, cfg)
    begin = time.perf_counter()
    found.is_whole = True
    for batch in stream.batches(found.counts):
        for context in batch.contexts:
            # The first segment is the beginning-of-sequence token's.
            pairs[context.document] += len(context.segments) - 1
        found.contexts += batch.contexts if keep_contexts else ()
        if batch.after["batches"] == 0 and time.perf_counter() - begin > seconds:
            found.is_whole = False
            break
    found.seconds = time.perf_counter() - begin
    if (
        found.is_whole
        and found.n_documents is None
        and found.counts.texts < cfg.eval_every_n_documents
    ):
        # A stream's length is unknown; in one this short, it matters whether a document is held
        # out.
        found.n_documents = sum(1 for _ in source.read())
    # Unless everything was read, the last document with pairs was read only in part.
    n_whole = max(pairs, default=0) + found.is_whole
    whole = [number for number in range(n_whole) if stream.is_read(number)]
    found.pairs_of = [pairs[number] for number in whole]
    found.sizes_of = [1] * len(whole)
    if isinstance(source.rows.dataset, Dataset) and not found.is_whole:
        _sample_sizes(source, whole, found)
    return found


def _sample_sizes(source: Source, whole: Sequence[int], found: FirstLook) -> None:
    n = found.n_documents or 0
    step = max(1, n // SAMPLED_DOCUMENTS)
    sample = [_size(next(source.read({"row": number}))[0]) for number in range(0, n, step)]
    first = [_size(document) for document, _ in islice(source.read(), max(whole, default=-1) + 1)]
    found.sizes_of = [first[number] for number in whole]
    found.mean_size = statistics.mean(sample)
    if step > 1:
        found.mean_size_error = statistics.stdev(sample) / math.sqrt(len(sample))


def _size(document: Any) -> int:
    """Characters of a document, or of the text form of its messages or token ids."""
    return len(document if isinstance(document, str) else str(document))


def _stream(pair: ModelPair, source: Source, cfg: DataConfig) -> ContextStream:
    # Context pools span several batches, so batches of one context read little at a time.
    return ContextStream(
        pair,
        [source],
        cfg.context_size,
        batch_size_prompts=1,
        part="training",
        eval_every_n_documents=cfg.eval_every_n_documents,
    )


def n_documents(rows: Rows) -> int | None:
    """Number of rows; none if it is not known without reading all of them."""
    dataset = rows.dataset
    if isinstance(dataset, Dataset):
        return len(dataset)
    split = (dataset.info.splits or {}).get(str(dataset.split))
    return None if split is None else split.num_examples or None


def together(looks: Sequence[FirstLook]) -> Coverage:
    """Combined coverage over the first documents of several data sets."""
    coverage = Coverage()
    for one in looks:
        coverage.add(one.counts.coverage)
    return coverage


def notes_on_text(looks: Sequence[FirstLook], cfg: DataConfig) -> Iterator[str]:
    """Notes on the text that do not stop the training."""
    for one in looks:
        of = f"Of the {counted(one.counts.texts, 'document')} of {one.dataset_path} that were read"
        if one.counts.unreadable:
            yield f"{of}, {one.counts.unreadable:,} cannot be read and will be left out."
        if one.counts.empty:
            yield f"{of}, {one.counts.empty:,} were empty (null, no character, no message)."
    if looks and all(one.n_held_out(cfg.eval_every_n_documents) == 0 for one in looks):
        n = sum(one.n_documents or 0 for one in looks)
        yield (
            f"No document is held out: the text has {counted(n, 'document')}, and every {cfg.eval_every_n_documents}th of a data set is (eval_every_n_documents). "
            "Nothing can be measured on this text after training. Give more documents, lower eval_every_n_documents, or evaluate "
            "with --dataset on other text."
        )


def top_reasons(coverage: Coverage) -> list[tuple[str, int, int]]:
    """The most frequent reasons why tokens have no partner, each with the number of A's and of B's
    tokens.

    >>> top_reasons(Coverage(9, 9, 7, Counter(tail=2), Counter(tail=1, no_partner=1)))[0]
    ('it lies after the last position that both models share', 2, 1)
    """
    both = coverage.dropped_a + coverage.dropped_b
    return [
        (REASONS[reason], coverage.dropped_a[reason], coverage.dropped_b[reason])
        for reason, _ in both.most_common(TOP_REASONS)
    ]


def expected_of_all(looks: Sequence[FirstLook], cfg: DataConfig) -> Expected | None:
    """Estimate the pairs in one pass over all data sets; none if the length of one is not known.

    A pass ends when the first data set can no longer supply its share.
    """
    sources, found = (
        cfg.all_sources,
        [one.expected_pairs(cfg.eval_every_n_documents) for one in looks],
    )
    if not found or any(one is None for one in found):
        return None
    total = sum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    scaled = [
        Expected(one.value / share, one.error / share)
        for one, share in zip(found, shares, strict=True)
        if one is not None
    ]
    return min(scaled)


def of_a_pass(looks: Sequence[FirstLook], cfg: DataConfig) -> float | None:
    """Distinct pairs that a training uses: `max_unique_pairs`, or all pairs if there are fewer; none
    if that is not known."""
    expected = expected_of_all(looks, cfg)
    numbers = [float(cfg.max_unique_pairs)] if cfg.max_unique_pairs else []
    numbers += [] if expected is None else [expected.value]
    return min(numbers, default=None)


def supply(looks: Sequence[FirstLook], cfg: CrosscoderRunnerConfig) -> str:
    """A sentence that compares the number of available pairs with the number that the training
    uses."""
    expected, wanted = expected_of_all(looks, cfg), f"{cfg.training_tokens:,} (training_tokens)"
    distinct = of_a_pass(looks, cfg)
    if distinct is None:
        return f"How many pairs there are is not known. Training takes {wanted}."
    there = f"{distinct:,.0f} (max_unique_pairs)" if expected is None else _about(expected)
    if distinct >= cfg.training_tokens:
        return f"Pairs to train on: {there}; training takes {wanted}, each once."
    times = "never" if distinct == 0 else f"each {cfg.training_tokens / distinct:.1f} times"
    of = f", of {distinct:,.0f} (max_unique_pairs)" if distinct == cfg.max_unique_pairs else ""
    return f"Pairs to train on: {there}; training takes {wanted}{of}, {times}."


def _about(expected: Expected) -> str:
    """
    >>> _about(Expected(123456, 0)), _about(Expected(123456, 2345))
    ('123,456', 'about 123,000 ± 2%')
    """
    if expected.error == 0:
        return f"{expected.value:,.0f}"
    digits = max(0, len(str(int(expected.value))) - 3)
    share = expected.error / expected.value if expected.value else math.inf
    spread = f" ± {share:.0%}" if share < 1 else "; treat this as a guess"
    return f"about {round(expected.value, -digits):,.0f}{spread}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def first_lines(
    pair: ModelPair, sources: Sequence[Source], cfg: CrosscoderRunnerConfig
) -> Iterator[str]:
    """Results from the first documents, for the log of a training that is about to read them; this
    takes about a second."""
    try:
        looks = [look(pair, source, cfg, A_MOMENT / len(sources)) for source in sources]
    except ValueError:
        return  # training itself raises it if it reaches that document
    coverage = together(looks)
    n_read = sum(one.counts.texts for one in looks)
    yield (
        f"Of the first {n_read} documents {coverage.a:.1%} of A's tokens and {coverage.b:.1%} of B's are paired"
    )
    for reason, n_a, n_b in top_reasons(coverage)[:1]:
        yield f"Most that are not, {n_a:,} of A's and {n_b:,} of B's: {reason}"
    yield supply(looks, cfg)
    yield from notes_on_text(looks, cfg)
    if pair.a.describe()["weights_sha256"] == pair.b.describe()["weights_sha256"]:
        yield "Both models have the same weights: read at one hook, there is no difference to find."
