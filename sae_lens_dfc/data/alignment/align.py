"""Finds the positions at which two tokenizations of a text have read the same characters, and
counts the others by reason."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from pydantic import ConfigDict

from sae_lens_dfc.data.alignment.segments import Segment, Segments
from sae_lens_dfc.data.alignment.spans import LETTER_OF_BYTE_TOKEN
from sae_lens_dfc.data.alignment.tokens import UNKNOWN, Tokens

INSIDE_CHARACTER = "inside_character"
NO_PARTNER = "no_partner"
OUT_OF_ORDER = "out_of_order"
TAIL = "tail"
TOO_LONG = "too_long"
TEMPLATE = "chat_template"
ALTERED = "altered_message"

REASONS = {
    INSIDE_CHARACTER: "the token ends inside a character, the other model has no token that ends there",
    NO_PARTNER: "the other model has no token that ends at this character",
    OUT_OF_ORDER: "the tokenizer maps this token to text before its predecessor's",
    TAIL: "it lies after the last position that both models share",
    TOO_LONG: "no shared position for a whole context",
    TEMPLATE: "it belongs to the chat template, not to a message, or to one that this template alters",
    ALTERED: "the other model's chat template drops, alters or moves this message",
}


@dataclass
class Coverage:
    """Number of tokens that are paired in each model, and of unpaired tokens by reason.

    >>> coverage = Coverage(tokens_a=10, tokens_b=8, pairs=8)
    >>> coverage.a, coverage.b
    (0.8, 1.0)
    """

    # The shares, which `to_dict` adds for the reader, follow from the counts.
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")

    tokens_a: int = 0
    tokens_b: int = 0
    pairs: int = 0
    dropped_a: Counter[str] = field(default_factory=Counter)
    """Number of A's unpaired tokens by reason, see `REASONS`."""
    dropped_b: Counter[str] = field(default_factory=Counter)

    @property
    def a(self) -> float:
        """Share of A's tokens that are paired."""
        return self.pairs / self.tokens_a if self.tokens_a else 0.0

    @property
    def b(self) -> float:
        """Share of B's tokens that are paired."""
        return self.pairs / self.tokens_b if self.tokens_b else 0.0

    def add(self, other: "Coverage") -> None:
        """Add the counts of another text."""
        self.tokens_a += other.tokens_a
        self.tokens_b += other.tokens_b
        self.pairs += other.pairs
        self.dropped_a += other.dropped_a
        self.dropped_b += other.dropped_b

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        return {
            "coverage_a": self.a,
            "coverage_b": self.b,
            "pairs": self.pairs,
            "tokens_a": self.tokens_a,
            "tokens_b": self.tokens_b,
            "dropped_a": dict(self.dropped_a),
            "dropped_b": dict(self.dropped_b),
        }

    def drop(self, reason: str) -> None:
        """Turn a pair that cannot be used into unpaired tokens."""
        self.pairs -= 1
        self.dropped_a[reason] += 1
        self.dropped_b[reason] += 1


def aligned_positions(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    """Positions in A's and in B's tokens at which both models have read exactly the same text.

    Both tokens end at the same character, at its last byte. Tokens before such a pair that end
    inside a character are also paired if the bytes from there up to the pair are known and the same
    in both: they then end at the same byte. Linear in the number of tokens.

    >>> a = Tokens([1, 2, 3], ends=[4, 5, 7], whole=[True] * 3, strings=["1989", "!", "ok"])
    >>> b = Tokens([7, 8, 9], ends=[3, 4, 7], whole=[True] * 3, strings=["198", "9", "!ok"])
    >>> aligned_positions(a, b)
    [(0, 1), (2, 2)]
    """
    in_a, in_b = _aligned(a, b)
    return list(zip(in_a.tolist(), in_b.tolist(), strict=True))


def _aligned(a: Tokens, b: Tokens) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    if a.strings == b.strings and np.array_equal(a.ends, b.ends):
        # Identical tokenizations: every token is paired, even those that end inside a character.
        return np.arange(len(a.ids)), np.arange(len(a.ids))
    end_a, whole_a = _last_whole_by_end(a)
    end_b, whole_b = _last_whole_by_end(b)
    _, in_a, in_b = np.intersect1d(end_a, end_b, assume_unique=True, return_indices=True)
    i, j = whole_a[in_a], whole_b[in_b]
    if len(whole_a) == len(a.ids) or len(whole_b) == len(b.ids):
        return i, j
    open_a, open_b = _open(a, whole_a), _open(b, whole_b)
    # Few tokens end inside a character, so a Python loop over those alone is fast.
    inside = [
        pair
        for k in np.flatnonzero(_n_since_pair_before(open_a, i) * _n_since_pair_before(open_b, j))
        for pair in _same_from_the_back(
            _unread(a, open_a, i, int(k)), _unread(b, open_b, j, int(k))
        )
    ]
    if not inside:
        return i, j
    more_i, more_j = np.array(inside).T
    return np.sort(np.append(i, more_i)), np.sort(np.append(j, more_j))


def _last_whole_by_end(
    tokens: Tokens,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Unique ends of the whole tokens that are in order, and the last position of each."""
    ends = np.asarray(tokens.ends, dtype=np.int64)
    in_order = np.asarray(tokens.whole, dtype=bool) & (ends >= _furthest_before(ends))
    positions = np.flatnonzero(in_order)
    ends = ends[positions]
    last = np.append(ends[1:] != ends[:-1], True)[: len(ends)]
    return ends[last], positions[last]


def _furthest_before(ends: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]


def _open(tokens: Tokens, whole: Int[np.ndarray, " whole"]) -> Bool[np.ndarray, " n"]:
    """The tokens that cannot be paired by their end alone: they end inside a character, or a later
    token has the same end."""
    ends = np.asarray(tokens.ends, dtype=np.int64)
    is_open = ends >= _furthest_before(ends)
    is_open[whole] = False
    return is_open


def _n_since_pair_before(
    is_open: Bool[np.ndarray, " n"], positions: Int[np.ndarray, " pairs"]
) -> Int[np.ndarray, " pairs"]:
    """Number of open tokens between each pair and the previous one."""
    return np.diff(np.cumsum(is_open)[positions], prepend=0)


class _Unread(NamedTuple):
    """The text that one model reads between two pairs, indexed by the number of letters left."""

    text: str
    """As the vocabulary spells it, with bytes spelled as in byte-level tokenizers."""
    open: dict[tuple[int, int], tuple[int, int]]
    """Maps the character that an open token ends in and the letters left after it to its position
    and the letters left before that character."""


def _unread(
    tokens: Tokens, is_open: Bool[np.ndarray, " n"], positions: Int[np.ndarray, " pairs"], k: int
) -> _Unread:
    start, stop = int(positions[k - 1]) + 1 if k else 0, int(positions[k]) + 1
    strings = [LETTER_OF_BYTE_TOKEN.get(string, string) for string in tokens.strings[start:stop]]
    text = "".join(strings)
    left = before = len(text)
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for position, string in enumerate(strings, start):
        if position == start or not is_open[position - 1]:
            before = left
        left -= len(string)
        if is_open[position]:
            found[int(tokens.ends[position]), left] = position, before
    return _Unread(text, found)


def _same_from_the_back(a: _Unread, b: _Unread) -> Iterator[tuple[int, int]]:
    """Pairs of open tokens followed by the same letters, and whose own character has the same
    letters too."""
    same = len(commonprefix([a.text[::-1], b.text[::-1]]).partition(UNKNOWN)[0])
    for place, (i, before_a) in a.open.items():
        j, before_b = b.open.get(place, (-1, 0))
        if j >= 0 and min(before_a, before_b) <= same:
            yield i, j


def align(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    """Align two tokenizations: the text as segments that each end in a pair, and the coverage.

    >>> a = Tokens([1, 2, 3], ends=[4, 5, 7], whole=[True] * 3, strings=["1989", "!", "ok"])
    >>> b = Tokens([7, 8, 9], ends=[3, 4, 7], whole=[True] * 3, strings=["198", "9", "!ok"])
    >>> segments, coverage = align(a, b)
    >>> list(segments)
    [Segment(ids_a=(1,), ids_b=(7, 8)), Segment(ids_a=(2, 3), ids_b=(9,))]
    >>> coverage.dropped_a, coverage.dropped_b
    (Counter({'no_partner': 1}), Counter({'no_partner': 1}))
    """
    pairs = np.stack(_aligned(a, b), axis=1)
    return cut(a.ids, b.ids, pairs), count(a, b, pairs)


Pairs = Sequence[tuple[int, int]] | Int[np.ndarray, "pairs 2"]
"""Positions in A's tokens and in B's."""


def cut(ids_a: Sequence[int], ids_b: Sequence[int], pairs: Pairs) -> Segments:
    """Cut both models' tokens into segments that each end in a pair; tokens after the last pair are
    dropped.

    >>> list(cut([1, 2, 3], [7, 8, 9], pairs=[(0, 1), (1, 2)]))
    [Segment(ids_a=(1,), ids_b=(7, 8)), Segment(ids_a=(2,), ids_b=(9,))]
    """
    ends_a, ends_b = _columns(pairs) + 1
    n_a, n_b = (int(ends[-1]) if len(ends) else 0 for ends in (ends_a, ends_b))
    return Segments(
        np.array(ids_a[:n_a], dtype=np.int64), np.array(ids_b[:n_b], dtype=np.int64), ends_a, ends_b
    )


def count(a: Tokens, b: Tokens, pairs: Pairs) -> Coverage:
    """Count the tokens that are paired, and the others by reason."""
    in_a, in_b = _columns(pairs)
    return Coverage(
        tokens_a=len(a.ids),
        tokens_b=len(b.ids),
        pairs=len(in_a),
        dropped_a=_reasons(a, in_a),
        dropped_b=_reasons(b, in_b),
    )


def _columns(pairs: Pairs) -> Int[np.ndarray, "2 pairs"]:
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T


def _reasons(tokens: Tokens, paired: Int[np.ndarray, " n"]) -> Counter[str]:
    ends, whole = np.asarray(tokens.ends, dtype=np.int64), np.asarray(tokens.whole, dtype=bool)
    left = np.ones(len(ends), dtype=bool)
    left[paired] = False
    out_of_order = left & (ends < _furthest_before(ends))
    inside = left & ~out_of_order & ~whole
    left &= ~out_of_order & ~inside
    tail_start = int(paired[-1]) + 1 if len(paired) else 0
    counts = {
        OUT_OF_ORDER: out_of_order.sum(),
        INSIDE_CHARACTER: inside.sum(),
        NO_PARTNER: left[:tail_start].sum(),
        TAIL: left[tail_start:].sum(),
    }
    return Counter({reason: int(n) for reason, n in counts.items() if n > 0})


def pack(segments: Sequence[Segment], context_size: int, coverage: Coverage) -> Iterator[Segments]:
    """Pack whole segments into contexts of at most `context_size` tokens in either model.

    So a text is always cut at the same place for both models. A segment longer than a context is
    dropped and counted.

    >>> segments = [Segment((1,), (5, 6)), Segment((2,), (7,)), Segment((3,), (8,))]
    >>> [len(context) for context in pack(segments, 3, Coverage())]
    [2, 1]
    """
    segments = Segments.of(segments)
    start = read_a = read_b = 0
    while start < len(segments):
        end = min(
            int(np.searchsorted(segments.ends_a, read_a + context_size, side="right")),
            int(np.searchsorted(segments.ends_b, read_b + context_size, side="right")),
        )
        if end > start:
            yield segments[start:end]
        else:
            coverage.drop(TOO_LONG)
            end = start + 1
        start, read_a, read_b = end, int(segments.ends_a[end - 1]), int(segments.ends_b[end - 1])
