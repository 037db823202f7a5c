from collections.abc import Sequence
from itertools import accumulate, combinations_with_replacement

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment.align import (
    INSIDE_CHARACTER,
    NO_PARTNER,
    OUT_OF_ORDER,
    TAIL,
    TOO_LONG,
    Coverage,
    align,
    aligned_positions,
    pack,
)
from sae_lens_dfc.data.alignment.segments import Segment
from sae_lens_dfc.data.alignment.tokens import UNKNOWN, Tokens, tokenize
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from tests.tokenizer_kinds import TOKENIZERS

Tokenizers = dict[str, PreTrainedTokenizerBase]

HARD_TEXTS = [
    "naïve café 1989",
    "🤖🇫🇷👩‍👩‍👧 emoji",
    "e\u0301 combining and é composed",
    "ﬁne ﬂuid Ⅷ ½",
    "日本語と English mixed",
    "שלום עולם mixed RTL",
    "\x00\x01\x07 control \u200b zero width",
    "   leading and trailing   ",
    "\n\n\t\n",
    "x" * 5_000,
    "",
]


def spelled(spans: Sequence[tuple[int, int]], strings: Sequence[str]) -> Tokens:
    """Tokens with these spans, as `tokenize` would give them."""
    starts = [start for start, _ in spans[1:]]
    whole = [start >= end for (_, end), start in zip(spans, starts, strict=False)]
    return Tokens(range(len(spans)), [end for _, end in spans], [*whole, True], strings)


def words(*strings: str) -> Tokens:
    """Tokens whose text is their spelling."""
    spans, end = list[tuple[int, int]](), 0
    for string in strings:
        spans.append((end, end + len(string)))
        end += len(string)
    return spelled(spans, strings)


def quadratic_oracle(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    """For tokens of one or more whole characters: every pair of positions that ends at the same
    character."""
    return [(i, j) for i in range(len(a.ids)) for j in range(len(b.ids)) if a.ends[i] == b.ends[j]]


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_aligned_with_itself_pairs_every_token(
    tokenizers: Tokenizers, name: str, text: str
) -> None:
    tokens = tokenize(tokenizers[name], text)
    _, coverage = align(tokens, tokens)
    assert coverage.pairs == coverage.tokens_a == len(tokens.ids)
    assert not coverage.dropped_a and not coverage.dropped_b


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("names", list(combinations_with_replacement(TOKENIZERS, 2)))
def test_every_token_is_either_paired_or_counted_with_a_reason(
    tokenizers: Tokenizers, names: Sequence[str], text: str
) -> None:
    a, b = (tokenize(tokenizers[name], text) for name in names)
    segments, coverage = align(a, b)
    assert coverage.pairs + coverage.dropped_a.total() == len(a.ids)
    assert coverage.pairs + coverage.dropped_b.total() == len(b.ids)
    assert len(segments) == coverage.pairs


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("names", list(combinations_with_replacement(TOKENIZERS, 2)))
def test_pairs_end_at_the_same_character_and_move_forward(
    tokenizers: Tokenizers, names: Sequence[str], text: str
) -> None:
    a, b = (tokenize(tokenizers[name], text) for name in names)
    pairs = aligned_positions(a, b)
    assert all(a.ends[i] == b.ends[j] for i, j in pairs)
    assert all(i < k and j < m for (i, j), (k, m) in zip(pairs, pairs[1:], strict=False))


@given(st.lists(st.integers(1, 4), max_size=12), st.lists(st.integers(1, 4), max_size=12))
def test_whole_character_tokens_agree_with_the_quadratic_oracle(
    lengths_a: list[int], lengths_b: list[int]
) -> None:
    a, b = (words(*("x" * n for n in lengths)) for lengths in (lengths_a, lengths_b))
    assert aligned_positions(a, b) == quadratic_oracle(a, b)


@pytest.mark.slow
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_aligns_between_bytes_and_normalizing_tokenizers(
    tokenizers: Tokenizers, text: str
) -> None:
    text = clean(text)
    a, b = tokenize(tokenizers["byte_bpe"], text), tokenize(tokenizers["unigram_nfkc"], text)
    pairs = aligned_positions(a, b)
    assert all(a.ends[i] == b.ends[j] for i, j in pairs)
    # Only the last byte of a character has read it whole, and the other tokenizer spells no bytes.
    assert all(a.whole[i] for i, _ in pairs)


def bytes_read(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Bytes of UTF-8 that a byte-level model has read after each token: one for each letter of its
    spelling."""
    return list(accumulate(len(s) for s in tokenize(tokenizer, text).strings))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ラーメンを食べる🤖e\u0301 x"), max_size=30))
def test_paired_models_have_read_the_same_bytes_even_where_tokens_straddle_characters(
    tokenizers: Tokenizers, text: str
) -> None:
    # Trained on Japanese, byte-level BPE merges the last bytes of one character with the first of
    # the next.
    japanese, english = tokenizers["byte_bpe_japanese"], tokenizers["byte_bpe"]
    a, b = tokenize(japanese, text), tokenize(english, text)
    read_a, read_b = bytes_read(japanese, text), bytes_read(english, text)
    pairs = aligned_positions(a, b)
    assert all(read_a[i] == read_b[j] for i, j in pairs)
    # And none is missed: where both have read the same bytes up to a character's end, they pair.
    ends = set(accumulate(len(character.encode()) for character in text))
    expected = [(read_a.index(n), read_b.index(n)) for n in sorted(ends & {*read_a} & {*read_b})]
    assert set(expected) <= set(pairs)


def test_a_token_that_straddles_two_characters_does_not_pair_inside_the_second() -> None:
    # "ab" as two 3-byte characters: A reads 2 bytes, then 3 more across the border, then 1.
    a = spelled([(0, 1), (0, 2), (1, 2)], ["xx", "xyy", "y"])
    assert a.whole == [False, False, True]
    assert aligned_positions(a, spelled([(0, 1), (1, 2)], ["X", "Y"])) == [(2, 1)]


def test_only_the_last_byte_of_a_character_pairs_with_the_whole_character() -> None:
    a = spelled([(0, 1), (0, 1), (0, 1), (1, 2)], ["ð", "Ł", "¤", "x"])
    b = spelled([(0, 1), (1, 2)], ["🤖", "x"])
    segments, coverage = align(a, b)
    assert segments == [Segment((0, 1, 2), (0,)), Segment((3,), (1,))]
    assert coverage.dropped_a == {INSIDE_CHARACTER: 2}


def test_bytes_of_a_character_pair_one_by_one_while_what_follows_is_spelled_the_same() -> None:
    a = spelled([(0, 2), (1, 2), (1, 2)], ["Ġð", "Ł", "¤"])
    b = spelled([(0, 1), (1, 2), (1, 2), (1, 2)], ["Ġ", "ð", "Ł", "¤"])
    # A's first token holds the space too, but ends at the same byte as B's second.
    assert aligned_positions(a, b) == [(0, 1), (1, 2), (2, 3)]


def test_what_an_unknown_token_has_read_is_not_told_by_its_spelling(tokenizers: Tokenizers) -> None:
    # One reads ">", then the halfwidth Korean vowel and the control character as one unknown token,
    # the other as two.
    text = "|>\uffc2\x08"
    a, b = tokenize(tokenizers["unigram_nfkc"], text), tokenize(tokenizers["characters_nfkc"], text)
    assert list(a.strings) == ["▁", "|", ">", UNKNOWN]
    assert list(b.strings) == ["|", ">", UNKNOWN, UNKNOWN]
    # Spelled "<unk>", B's first unknown token seemed to have read the ">" that A has.
    assert aligned_positions(a, b) == [(1, 0), (3, 3)]


def test_a_split_number_pairs_at_its_end() -> None:
    assert aligned_positions(words("1989"), words("198", "9")) == [(0, 1)]


def test_each_reason_is_named() -> None:
    a = Tokens(range(4), [2, 1, 4, 6], [True] * 4, ["ab", "?", "cd", "ef"])
    b = Tokens(range(3), [2, 3, 5], [True] * 3, ["ab", "c", "de"])
    _, coverage = align(a, b)
    assert coverage.dropped_a == {OUT_OF_ORDER: 1, TAIL: 2}
    assert coverage.dropped_b == {TAIL: 2}
    _, coverage = align(words("a", "b", "c"), words("ab", "c"))
    assert coverage.dropped_a == {NO_PARTNER: 1} and not coverage.dropped_b


def test_segments_hold_every_token_up_to_the_last_pair() -> None:
    a, b = words("un", "believ", "able", "!"), words("unbeliev", "able", "!?")
    segments, _ = align(a, b)
    assert [i for s in segments for i in s.ids_a] == [0, 1, 2]
    assert [i for s in segments for i in s.ids_b] == [0, 1]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=30), st.integers(1, 8))
def test_packed_contexts_fit_keep_order_and_lose_only_what_is_counted(
    sizes: list[tuple[int, int]], context_size: int
) -> None:
    segments = [Segment((i,) * n, (i,) * m) for i, (n, m) in enumerate(sizes)]
    coverage = Coverage(pairs=len(segments))
    contexts = list(pack(segments, context_size, coverage))
    for context in contexts:
        assert context
        assert sum(len(s.ids_a) for s in context) <= context_size
        assert sum(len(s.ids_b) for s in context) <= context_size
    kept = [s for context in contexts for s in context]
    assert kept == [s for s in segments if max(map(len, s)) <= context_size]
    assert coverage.pairs == len(kept)
    assert coverage.dropped_a[TOO_LONG] == len(segments) - len(kept)


def test_time_grows_with_the_text_not_with_its_square() -> None:
    # 400,000 tokens without a shared end but the last: a quadratic matcher would need 10^11 steps.
    n = 400_000
    a = Tokens(range(n), range(1, 2 * n, 2), [True] * n, ["a"] * n)
    b = Tokens(range(n), range(2, 2 * n + 1, 2), [True] * n, ["b"] * n)
    assert aligned_positions(a, b) == []


def test_coverage_of_cpython_docs_is_the_same_whichever_way_the_models_are_named(
    tokenizers: Tokenizers,
) -> None:
    text = reference_pages()[0]
    a, b = tokenize(tokenizers["byte_bpe"], text), tokenize(tokenizers["sentencepiece_bpe"], text)
    one, other = align(a, b)[1], align(b, a)[1]
    assert (one.a, one.b) == (other.b, other.a)
