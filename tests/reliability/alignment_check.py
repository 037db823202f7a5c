"""Whether an alignment of two readings of one text is right, by brute force."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, cycle

import pytest
from jaxtyping import config
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment.align import (
    INSIDE_CHARACTER,
    NO_PARTNER,
    OUT_OF_ORDER,
    TAIL,
    TOO_LONG,
    Coverage,
    align,
    pack,
)
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.alignment.tokens import Tokens
from sae_lens_dfc.data.text.cleaning import clean
from tests.reliability.hard_text import hard_texts
from tests.reliability.reading import Reader, Reading

Aligner = Callable[[Tokens, Tokens], tuple[Segments, Coverage]]


def check_alignment(a: Reading, b: Reading, context_size: int, aligner: Aligner = align) -> None:
    """Raise AssertionError where the alignment is wrong in anything."""
    segments, coverage = aligner(a.tokens, b.tokens)
    pairs = list(zip((segments.ends_a - 1).tolist(), (segments.ends_b - 1).tolist(), strict=True))
    _check_pairs(a, b, pairs)
    _check_none_missed(a, b, pairs)
    _check_coverage(a, b, pairs, coverage)
    _check_segments(a, b, pairs, segments)
    _check_contexts(segments, coverage, context_size)


def _check_pairs(a: Reading, b: Reading, pairs: Sequence[tuple[int, int]]) -> None:
    for i, j in pairs:
        same = a.read[i] == b.read[j] or a.ends[i] & b.ends[j] or a.inside[i] & b.inside[j]
        assert same, f"pair {(i, j)} has not read the same text"
    forward = all(i < k and j < m for (i, j), (k, m) in zip(pairs, pairs[1:], strict=False))
    assert forward, "pairs go back"


def _check_none_missed(a: Reading, b: Reading, pairs: Sequence[tuple[int, int]]) -> None:
    paired_a, paired_b = {i for i, _ in pairs}, {j for _, j in pairs}
    left_a, left_b = (
        {min(ends) for i, ends in enumerate(r.ends) if ends and r.new[i] and i not in paired}
        for r, paired in ((a, paired_a), (b, paired_b))
    )
    missed = (left_a & left_b) - a.unsure - b.unsure
    assert not missed, f"after {missed} bytes both models have read the same, without a pair"


def _check_coverage(
    a: Reading, b: Reading, pairs: Sequence[tuple[int, int]], coverage: Coverage
) -> None:
    assert (coverage.tokens_a, coverage.tokens_b) == (len(a.tokens.ids), len(b.tokens.ids))
    assert coverage.pairs == len(pairs), "the total of pairs is wrong"
    _check_reasons(a, [i for i, _ in pairs], coverage.dropped_a)
    _check_reasons(b, [j for _, j in pairs], coverage.dropped_b)


def _check_reasons(reading: Reading, paired: Sequence[int], dropped: Counter[str]) -> None:
    left = sorted({*range(len(reading.read))} - {*paired})
    assert len(left) == dropped.total(), "a token is not counted"
    last = max(paired, default=-1)
    expected, unsure = Counter[str](), 0
    borders = reading.borders
    for i in left:
        at = reading.ends[i] & borders
        if reading.raw_ends[i] < max(reading.raw_ends[:i], default=0):
            expected[OUT_OF_ORDER] += 1
        elif not at and reading.new[i]:
            expected[INSIDE_CHARACTER] += 1
        elif at & reading.unsure or not reading.new[i]:
            unsure += 1
        else:
            expected[TAIL if i > last else NO_PARTNER] += 1
    # A letter and the marks that its tokenizer may join with it are one character or more.
    is_right = (dropped - expected).total() == unsure and not expected - dropped
    assert is_right, f"reasons {dropped}, not {expected}"


def _check_segments(
    a: Reading, b: Reading, pairs: Sequence[tuple[int, int]], segments: Segments
) -> None:
    last_a, last_b = pairs[-1] if pairs else (-1, -1)
    for ids, whole in (
        ([t for s in segments for t in s.ids_a], a.tokens.ids[: last_a + 1]),
        ([t for s in segments for t in s.ids_b], b.tokens.ids[: last_b + 1]),
    ):
        assert ids == list(whole), "segments are not the text's tokens"
    assert len(segments) == len(pairs)


def _check_contexts(segments: Segments, coverage: Coverage, context_size: int) -> None:
    before = coverage.pairs
    contexts = list(pack(segments, context_size, coverage))
    assert all(0 < c.n_tokens <= context_size for c in contexts), "a context is too long or empty"
    fits = [s for s in segments if max(len(s.ids_a), len(s.ids_b)) <= context_size]
    assert [s for c in contexts for s in c] == fits, "contexts do not hold the segments that fit"
    dropped = (coverage.dropped_a[TOO_LONG], coverage.dropped_b[TOO_LONG], before - coverage.pairs)
    assert dropped == (before - len(fits),) * 3, "what is too long is not counted"


def clean_checked(text: str) -> str:
    """The text as tokenizers take it: lone surrogates replaced, nothing else."""
    cleaned = clean(text)
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert cleaned == expected
    return cleaned


def fuzz_of_tokenizers(
    tokenizers: dict[str, PreTrainedTokenizerBase], seed: int, n_strings: int
) -> None:
    """Try so many strings of a seed in these tokenizers."""
    readers = {name: Reader(tokenizer) for name, tokenizer in tokenizers.items()}
    # Shapes are checked in all other tests; here that would take a third of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)
        fuzz(readers, seed, n_strings)


def fuzz(readers: dict[str, Reader], seed: int, n_strings: int) -> None:
    """Check so many strings, each in three tokenizers: their pairs and one of them with itself, all
    in turn."""
    groups = list(combinations(readers, 3))
    random.Random(seed).shuffle(groups)
    for n, (text, names) in enumerate(zip(hard_texts(seed), cycle(groups), strict=False)):
        if n == n_strings:
            return
        group = {name: readers[name] for name in names}
        check_text(
            clean_checked(text),
            group,
            [*combinations(names, 2), (names[n % 3], names[n % 3])],
            2 + n % 9,
        )


def check_text(
    text: str,
    readers: dict[str, Reader],
    pairs: Iterable[tuple[str, str]],
    context_size: int,
    aligner: Aligner = align,
) -> None:
    """Check one text in these pairs of tokenizers."""
    readings: dict[str, Reading] = {}
    for a, b in pairs:
        try:
            for name in (a, b):
                readings[name] = readings.get(name) or readers[name].read(text)
            check_alignment(readings[a], readings[b], context_size, aligner)
        except Exception as error:
            raise AssertionError(f"{a} and {b}, {ascii(text)}: {error!r}") from error
