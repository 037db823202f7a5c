"""The check of the fuzz itself: that it fails where the alignment is wrong, and that it holds of
all pairs and real tokenizers."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import combinations, combinations_with_replacement, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jaxtyping import config
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment import align as align_module
from sae_lens_dfc.data.alignment.align import (
    NO_PARTNER,
    TAIL,
    Coverage,
    align,
    aligned_positions,
    count,
    cut,
    pack,
)
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.alignment.tokens import Tokens, tokenize
from sae_lens_dfc.data.sources import MAX_CHARS
from sae_lens_dfc.data.text.cleaning import clean, split_text
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B, unpack
from tests.reliability import alignment_check
from tests.reliability.alignment_check import Aligner, check_text, clean_checked
from tests.reliability.hard_text import FAMILIES, SPELLED, WORDS, hard_texts
from tests.reliability.reading import Reader

Tokenizers = dict[str, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def readers(tokenizers: Tokenizers) -> dict[str, Reader]:
    return {name: Reader(tokenizer) for name, tokenizer in tokenizers.items()}


PARTS = [*FAMILIES, *SPELLED, *WORDS, "e\u0301", "q\u0301\u0323", "ﷺ", "½", "가\u11a8", "\x00", "\r\n", "  ", "\ud800"]  # fmt: skip


@pytest.mark.slow
@hypothesis_settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(max_size=12) | st.lists(st.sampled_from(PARTS) | st.text(max_size=2), max_size=5).map("".join))  # fmt: skip
def test_any_text_pairs_rightly_in_all_pairs_of_tokenizers(
    readers: dict[str, Reader], text: str
) -> None:
    pairs = combinations_with_replacement(readers, 2)
    check_text(clean_checked(text), readers, pairs, context_size=4)


@pytest.mark.slow
def test_hard_text_pairs_rightly_in_the_demos_tokenizers(readers: dict[str, Reader]) -> None:
    real = {model.name: Reader(AutoTokenizer.from_pretrained(unpack(model))) for model in (DEMO_A, DEMO_B)}  # fmt: skip
    names = [*real, "byte_bpe", "wordpiece_lowercase"]
    for n, text in enumerate(islice(hard_texts(seed=100), 500)):
        check_text(clean_checked(text), readers | real, combinations(names, 2), 2 + n % 9)


def paired_by(positions: Callable[[Tokens, Tokens], list[tuple[int, int]]]) -> Aligner:
    """An aligner that is as it should be but for its pairs."""

    def wrong(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
        pairs = positions(a, b)
        return cut(a.ids, b.ids, pairs), count(a, b, pairs)

    return wrong


def believing_every_end(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    a, b = (t._replace(whole=[True] * len(t.ids)) for t in (a, b))
    return aligned_positions(a, b)


def blaming_the_tail(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    segments, coverage = align(a, b)
    dropped = Counter({TAIL if r == NO_PARTNER else r: n for r, n in coverage.dropped_a.items()})
    return segments, replace(coverage, dropped_a=dropped)


def losing_a_token(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    segments, coverage = align(a, b)
    ids_a = segments.ids_a.copy()
    ids_a[len(ids_a) // 2 :] = np.roll(ids_a[len(ids_a) // 2 :], 1)
    return Segments(ids_a, segments.ids_b, segments.ends_a, segments.ends_b), coverage


def turned_around(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    segments, coverage = align(a, b)
    back = Segments(
        segments.ids_a, segments.ids_b, segments.ends_a[::-1].copy(), segments.ends_b[::-1].copy()
    )
    return back, coverage


def counting_one_pair_more(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    segments, coverage = align(a, b)
    return segments, replace(coverage, pairs=coverage.pairs + 1)


# Each with what the check says of it.
WRONG: dict[str, tuple[Aligner, str]] = {
    "one pair less": (
        paired_by(lambda a, b: aligned_positions(a, b)[:-1]),
        "without a pair",
    ),
    "no pair inside a character": (
        paired_by(lambda a, b: [(i, j) for i, j in aligned_positions(a, b) if a.whole[i]]),
        "without a pair",
    ),
    "a pair one token late": (
        paired_by(
            lambda a, b: [(min(i + 1, len(a.ids) - 1), j) for i, j in aligned_positions(a, b)]
        ),
        "has not read the same text",
    ),
    "every end is a character's": (paired_by(believing_every_end), "has not read the same text"),
    "pairs that go back": (turned_around, "pairs go back"),
    "a pair too many in the total": (counting_one_pair_more, "the total of pairs is wrong"),
    "another reason": (blaming_the_tail, "reasons Counter"),
    "tokens in another order": (losing_a_token, "segments are not the text's tokens"),
}


def until_noticed(readers: dict[str, Reader], aligner: Aligner = align) -> tuple[int, str]:
    """How many of up to 300 texts of the fuzz it takes, and what is said then."""
    pairs = list(combinations(readers, 2))
    for n, text in enumerate(islice(hard_texts(seed=0), 300)):
        try:
            check_text(clean(text), readers, [pairs[n % len(pairs)]], 4, aligner)
        except AssertionError as error:
            return n + 1, str(error)
    raise AssertionError("nothing was noticed")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_alignment_is_noticed(readers: dict[str, Reader], name: str) -> None:
    aligner, word = WRONG[name]
    n_texts, said = until_noticed(readers, aligner)
    assert n_texts <= 100 and word in said


Contexts = Iterator[Segments]


def losing_one(segments: Segments, size: int, coverage: Coverage) -> Contexts:
    return (context for n, context in enumerate(pack(segments, size, coverage)) if n != 1)


def one_token_too_long(segments: Segments, size: int, coverage: Coverage) -> Contexts:
    return pack(segments, size + 1, coverage)


def in_another_order(segments: Segments, size: int, coverage: Coverage) -> Contexts:
    return reversed(list(pack(segments, size, coverage)))


def without_counting(segments: Segments, size: int, coverage: Coverage) -> Contexts:
    return pack(segments, size, deepcopy(coverage))


@pytest.mark.parametrize(
    ("packer", "word"),
    [
        (losing_one, "do not hold the segments that fit"),
        (one_token_too_long, "too long or empty"),
        (in_another_order, "do not hold the segments that fit"),
        (without_counting, "what is too long is not counted"),
    ],
)
def test_a_wrong_packing_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch, packer: Any, word: str
) -> None:
    monkeypatch.setattr(alignment_check, "pack", packer)
    n_texts, said = until_noticed(readers)
    assert n_texts <= 100 and word in said


def test_the_tokenizers_own_spans_are_noticed_to_be_wrong(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(_tokenizer: Any, _text: Any, spans: Any, _strings: Any) -> Any:
        return spans

    monkeypatch.setattr("sae_lens_dfc.data.alignment.tokens.true_spans", own)
    assert until_noticed(readers)[0] <= 100


def test_a_pair_by_the_end_of_a_spelling_alone_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_module, "_same_from_the_back", lambda a, b: [
        (i, b.open[place][0]) for place, (i, _) in a.open.items() if place in b.open
    ])  # fmt: skip
    assert until_noticed(readers)[0] <= 100


WITHOUT_SPACE = {
    "one letter": "x",
    "Japanese": "ラーメンを食べる日本語",
    "marks": "\u0301\u0323\u0334",
}


def seconds(tokenizers: list[PreTrainedTokenizerBase], text: str) -> float:
    start = time.process_time()
    pairs = 0
    for piece in split_text(clean(text), MAX_CHARS):
        a, *others = (tokenize(tokenizer, piece) for tokenizer in tokenizers)
        pairs += sum(align(a, other)[1].pairs for other in others)
    assert pairs > 0
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITHOUT_SPACE)
def test_a_million_characters_without_a_space_take_time_in_proportion(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    pair = [tokenizers["byte_bpe_nfc"], tokenizers["unigram_bytes"]]
    unit = WITHOUT_SPACE[kind]
    text = unit * (1_000_000 // len(unit) + 1)
    seconds(pair, text[:20_000])
    # Ten times the text; quadratic would be a hundred times the time.
    assert seconds(pair, text[:1_000_000]) < 30 * seconds(pair, text[:100_000]) + 1
