"""Two tokenizations of one text: which positions have read the same text, and why the others have not."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sae_lens_dfc.tokens import Tokens

INSIDE_CHARACTER = "inside_character"
NO_PARTNER = "no_partner"
OUT_OF_ORDER = "out_of_order"
TAIL = "tail"
TOO_LONG = "too_long"

REASONS = {
    INSIDE_CHARACTER: "the token ends inside a character, the other model has no token that ends there",
    NO_PARTNER: "the other model has no token that ends at this character",
    OUT_OF_ORDER: "the tokenizer maps this token to text before its predecessor's",
    TAIL: "it lies after the last position that both models share",
    TOO_LONG: "no shared position for a whole context",
}


class Segment(NamedTuple):
    """The tokens of each model between one shared position and the next; its last tokens are a pair."""

    ids_a: tuple[int, ...]
    ids_b: tuple[int, ...]


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

    def drop(self, reason: str) -> None:
        """Count a pair that could not be used after all."""
        self.pairs -= 1
        self.dropped_a[reason] += 1
        self.dropped_b[reason] += 1


def aligned_positions(a: Tokens, b: Tokens) -> list[tuple[int, int]]:
    """Positions, in A's tokens and in B's, at which both models have read exactly the same text.

    Both tokens are whole and end at the same character. Tokens before such a pair that end inside a
    character pair too, as long as everything after them is spelled the same in both: then they end
    at the same byte. Linear in the number of tokens.

    >>> a = Tokens([1, 2, 3], ends=[4, 5, 7], whole=[True] * 3, strings=["1989", "!", "ok"])
    >>> b = Tokens([7, 8, 9], ends=[3, 4, 7], whole=[True] * 3, strings=["198", "9", "!ok"])
    >>> aligned_positions(a, b)
    [(0, 1), (2, 2)]
    """
    last_a, last_b = _last_whole_by_end(a), _last_whole_by_end(b)
    pairs: list[tuple[int, int]] = []
    for end, i in last_a.items():
        if end in last_b:
            pairs += reversed(list(_same_from_the_back(a, i, b, last_b[end])))
    return pairs


def _last_whole_by_end(tokens: Tokens) -> dict[int, int]:
    positions: dict[int, int] = {}
    furthest = 0
    for position, end in enumerate(tokens.ends):
        if end >= furthest and tokens.whole[position]:
            positions[end] = position
        furthest = max(furthest, end)
    return positions


def _same_from_the_back(a: Tokens, i: int, b: Tokens, j: int) -> Iterator[tuple[int, int]]:
    end = a.ends[i]
    while True:
        yield i, j
        same = a.strings[i] == b.strings[j]
        i, j = i - 1, j - 1
        if not same or i < 0 or j < 0 or not (_open(a, i, end) and _open(b, j, end)):
            return


def _open(tokens: Tokens, position: int, end: int) -> bool:
    """Whether no pair of its own can hold this token: it ends inside a character, or a later one ends with it."""
    return not tokens.whole[position] or tokens.ends[position] == end


def align(a: Tokens, b: Tokens) -> tuple[list[Segment], Coverage]:
    """The text as segments, each ending in a pair, and what was left out.

    >>> a = Tokens([1, 2, 3], ends=[4, 5, 7], whole=[True] * 3, strings=["1989", "!", "ok"])
    >>> b = Tokens([7, 8, 9], ends=[3, 4, 7], whole=[True] * 3, strings=["198", "9", "!ok"])
    >>> segments, coverage = align(a, b)
    >>> segments
    [Segment(ids_a=(1,), ids_b=(7, 8)), Segment(ids_a=(2, 3), ids_b=(9,))]
    >>> coverage.dropped_a, coverage.dropped_b
    (Counter({'no_partner': 1}), Counter({'no_partner': 1}))
    """
    pairs = aligned_positions(a, b)
    segments: list[Segment] = []
    start_a = start_b = 0
    for i, j in pairs:
        segments.append(Segment(tuple(a.ids[start_a : i + 1]), tuple(b.ids[start_b : j + 1])))
        start_a, start_b = i + 1, j + 1
    coverage = Coverage(
        tokens_a=len(a.ids),
        tokens_b=len(b.ids),
        pairs=len(pairs),
        dropped_a=_reasons(a, {i for i, _ in pairs}, start_a),
        dropped_b=_reasons(b, {j for _, j in pairs}, start_b),
    )
    return segments, coverage


def _reasons(tokens: Tokens, paired: set[int], tail_start: int) -> Counter[str]:
    reasons: Counter[str] = Counter()
    furthest = 0
    for position, end in enumerate(tokens.ends):
        if position not in paired:
            reasons[_reason(tokens, position, furthest, tail_start)] += 1
        furthest = max(furthest, end)
    return reasons


def _reason(tokens: Tokens, position: int, furthest: int, tail_start: int) -> str:
    if tokens.ends[position] < furthest:
        return OUT_OF_ORDER
    if not tokens.whole[position]:
        return INSIDE_CHARACTER
    return TAIL if position >= tail_start else NO_PARTNER


def pack(
    segments: Iterable[Segment], context_size: int, coverage: Coverage
) -> Iterator[list[Segment]]:
    """Contexts of whole segments, none longer than `context_size` tokens in either model.

    A text is therefore never cut at different places for the two models. A segment that fills a
    context by itself is left out and counted.

    >>> segments = [Segment((1,), (5, 6)), Segment((2,), (7,)), Segment((3,), (8,))]
    >>> [len(context) for context in pack(segments, 3, Coverage())]
    [2, 1]
    """
    context: list[Segment] = []
    used_a = used_b = 0
    for segment in segments:
        n_a, n_b = len(segment.ids_a), len(segment.ids_b)
        too_long = max(n_a, n_b) > context_size
        if context and (too_long or used_a + n_a > context_size or used_b + n_b > context_size):
            yield context
            context, used_a, used_b = [], 0, 0
        if too_long:
            coverage.drop(TOO_LONG)
            continue
        context.append(segment)
        used_a, used_b = used_a + n_a, used_b + n_b
    if context:
        yield context
