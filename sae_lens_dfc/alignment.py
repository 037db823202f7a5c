"""Two tokenizations of one text: which positions have read the same text, and why the others have not."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_lens_dfc.files import from_plain
from sae_lens_dfc.segments import Segment, Segments
from sae_lens_dfc.spans import LETTER_OF_BYTE_TOKEN
from sae_lens_dfc.tokens import UNKNOWN, Tokens

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
    """How many tokens of each model found a partner, and why the others did not.

    >>> coverage = Coverage(tokens_a=10, tokens_b=8, pairs=8)
    >>> coverage.a, coverage.b
    (0.8, 1.0)
    """

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
        """Count another text's tokens in."""
        self.tokens_a += other.tokens_a
        self.tokens_b += other.tokens_b
        self.pairs += other.pairs
        self.dropped_a += other.dropped_a
        self.dropped_b += other.dropped_b

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "coverage_a": self.a,
            "coverage_b": self.b,
            "pairs": self.pairs,
            "tokens_a": self.tokens_a,
            "tokens_b": self.tokens_b,
            "dropped_a": dict(self.dropped_a),
            "dropped_b": dict(self.dropped_b),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Coverage":
        """The counts back from `to_dict`.

        Raises:
            ValueError: It is something else.

        >>> Coverage.from_dict(Coverage(10, 8, 8).to_dict()) == Coverage(10, 8, 8)
        True
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A coverage must be a mapping of counts, got {values!r:.80}.")
        dropped = {name: values.get(name) for name in ("dropped_a", "dropped_b")}
        if not all(
            isinstance(d, dict) and all(isinstance(n, int) for n in d.values())
            for d in dropped.values()
        ):
            raise ValueError(
                f"A coverage must count what was dropped by reason, got {dropped!r:.80}."
            )
        own = {name: values.get(name) for name in ("tokens_a", "tokens_b", "pairs")}
        counters = {name: Counter(d) for name, d in dropped.items()}
        return from_plain(cls, {**own, **counters}, "A coverage")

    def drop(self, reason: str) -> None:
        """Count a pair that could not be used after all."""
        self.pairs -= 1
        self.dropped_a[reason] += 1
        self.dropped_b[reason] += 1


def aligned_positions(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    """Positions, in A's tokens and in B's, at which both models have read exactly the same text.

    Both tokens are whole and end at the same character. Tokens before such a pair that end inside a
    character pair too where what is left of it up to the pair is known and spelled the same in both: then
    they end at the same byte. Linear in the number of tokens.

    >>> a = Tokens([1, 2, 3], ends=[4, 5, 7], whole=[True] * 3, strings=["1989", "!", "ok"])
    >>> b = Tokens([7, 8, 9], ends=[3, 4, 7], whole=[True] * 3, strings=["198", "9", "!ok"])
    >>> aligned_positions(a, b)
    [(0, 1), (2, 2)]
    """
    in_a, in_b = _aligned(a, b)
    return list(zip(in_a.tolist(), in_b.tolist(), strict=True))


def _aligned(a: Tokens, b: Tokens) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    if a.strings == b.strings and np.array_equal(a.ends, b.ends):
        # One tokenizer, or two that cut this text alike: each token has its twin, whatever it ends inside.
        return np.arange(len(a.ids)), np.arange(len(a.ids))
    end_a, whole_a = _last_whole_by_end(a)
    end_b, whole_b = _last_whole_by_end(b)
    _, in_a, in_b = np.intersect1d(end_a, end_b, assume_unique=True, return_indices=True)
    i, j = whole_a[in_a], whole_b[in_b]
    if len(whole_a) == len(a.ids) or len(whole_b) == len(b.ids):
        return i, j
    open_a, open_b = _open(a, whole_a), _open(b, whole_b)
    # Few tokens end inside a character; to look at those alone keeps the rest out of Python's loops.
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
    """Ends of the whole tokens that are in order, each once, and the last position that has each."""
    ends = np.asarray(tokens.ends, dtype=np.int64)
    in_order = np.asarray(tokens.whole, dtype=bool) & (ends >= _furthest_before(ends))
    positions = np.flatnonzero(in_order)
    ends = ends[positions]
    last = np.append(ends[1:] != ends[:-1], True)[: len(ends)]
    return ends[last], positions[last]


def _furthest_before(ends: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]


def _open(tokens: Tokens, whole: Int[np.ndarray, " whole"]) -> Bool[np.ndarray, " n"]:
    """The tokens that no pair of their own can hold: they end inside a character, or a later one ends with them."""
    ends = np.asarray(tokens.ends, dtype=np.int64)
    is_open = ends >= _furthest_before(ends)
    is_open[whole] = False
    return is_open


def _n_since_pair_before(
    is_open: Bool[np.ndarray, " n"], positions: Int[np.ndarray, " pairs"]
) -> Int[np.ndarray, " pairs"]:
    """How many open tokens there are between each pair and the one before."""
    return np.diff(np.cumsum(is_open)[positions], prepend=0)


class _Unread(NamedTuple):
    """What one model reads between two pairs, by how much of it is left."""

    text: str
    """As the vocabulary spells it, bytes as byte-level tokenizers do."""
    open: dict[tuple[int, int], tuple[int, int]]
    """For each open token, by the character it ends in and the letters left after it: its position, and the letters
    left before its character."""


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
    """Pairs of open tokens with the same letters left, where those of their character are the same too."""
    same = len(commonprefix([a.text[::-1], b.text[::-1]]).partition(UNKNOWN)[0])
    for place, (i, before_a) in a.open.items():
        j, before_b = b.open.get(place, (-1, 0))
        if j >= 0 and min(before_a, before_b) <= same:
            yield i, j


def align(a: Tokens, b: Tokens) -> tuple[Segments, Coverage]:
    """The text as segments, each ending in a pair, and what was left out.

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
    """The tokens of each model as segments, each ending in a pair; what lies after the last pair is left out.

    >>> list(cut([1, 2, 3], [7, 8, 9], pairs=[(0, 1), (1, 2)]))
    [Segment(ids_a=(1,), ids_b=(7, 8)), Segment(ids_a=(2,), ids_b=(9,))]
    """
    ends_a, ends_b = _columns(pairs) + 1
    n_a, n_b = (int(ends[-1]) if len(ends) else 0 for ends in (ends_a, ends_b))
    return Segments(
        np.array(ids_a[:n_a], dtype=np.int64), np.array(ids_b[:n_b], dtype=np.int64), ends_a, ends_b
    )


def count(a: Tokens, b: Tokens, pairs: Pairs) -> Coverage:
    """How many tokens these pairs cover, and why the others are in none."""
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
    """Contexts of whole segments, none longer than `context_size` tokens in either model.

    A text is therefore never cut at different places for the two models. A segment that fills a
    context by itself is left out and counted.

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
