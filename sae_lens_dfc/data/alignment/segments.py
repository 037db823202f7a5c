"""Stores the segments of a text, cut at positions that two models share, as arrays."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int
from typing_extensions import override


class Segment(NamedTuple):
    """Each model's tokens from one shared position to the next; the last tokens are a pair."""

    ids_a: tuple[int, ...]
    ids_b: tuple[int, ...]


class Segments(Sequence[Segment]):
    """Segments of one text, in order. They are stored as arrays, because Python objects would cost
    more garbage collection time than tokenization takes.

    >>> segments = Segments.of([Segment((1,), (5, 6)), Segment((2, 3), (7,))])
    >>> segments[1], len(segments[:1]), segments.last_a, segments.last_b
    (Segment(ids_a=(2, 3), ids_b=(7,)), 1, array([0, 2]), array([1, 2]))
    """

    __slots__ = ("ends_a", "ends_b", "ids_a", "ids_b")

    def __init__(
        self,
        ids_a: Int[np.ndarray, " tokens_a"],
        ids_b: Int[np.ndarray, " tokens_b"],
        ends_a: Int[np.ndarray, " n"],
        ends_b: Int[np.ndarray, " n"],
    ):
        self.ids_a = ids_a
        """A's tokens up to the last segment's end."""
        self.ids_b = ids_b
        self.ends_a = ends_a
        """Number of A's tokens up to each segment's end."""
        self.ends_b = ends_b

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "Segments":
        """Convert a sequence of segments."""
        if isinstance(segments, Segments):
            return segments
        return cls(
            _array([i for segment in segments for i in segment.ids_a]),
            _array([i for segment in segments for i in segment.ids_b]),
            np.cumsum(_array([len(segment.ids_a) for segment in segments])),
            np.cumsum(_array([len(segment.ids_b) for segment in segments])),
        )

    def after(self, first: Segment) -> "Segments":
        """These segments with another one prepended."""
        n_a, n_b = len(first.ids_a), len(first.ids_b)
        return Segments(
            np.concatenate([_array(first.ids_a), self.ids_a]),
            np.concatenate([_array(first.ids_b), self.ids_b]),
            np.concatenate([_array([n_a]), self.ends_a + n_a]),
            np.concatenate([_array([n_b]), self.ends_b + n_b]),
        )

    @property
    def last_a(self) -> Int[np.ndarray, " n"]:
        """Position of each segment's last token in A; 0 for empty leading segments."""
        return np.maximum(self.ends_a - 1, 0)

    @property
    def last_b(self) -> Int[np.ndarray, " n"]:
        """Position of each segment's last token in B."""
        return np.maximum(self.ends_b - 1, 0)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the model that has more."""
        return max(len(self.ids_a), len(self.ids_b))

    @override
    def __len__(self) -> int:
        return len(self.ends_a)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> "Segments": ...
    @override
    def __getitem__(self, index: int | slice) -> "Segment | Segments":
        if isinstance(index, slice):
            return self._part(*index.indices(len(self)))
        one = range(len(self))[index]
        return next(iter(self._part(one, one + 1, 1)))

    def _part(self, start: int, stop: int, step: int) -> "Segments":
        if step != 1:
            raise ValueError(f"Segments can only be sliced with step 1, got {step}.")
        stop = max(start, stop)
        (from_a, to_a), (from_b, to_b) = (
            (int(ends[start - 1]) if start else 0, int(ends[stop - 1]) if stop else 0)
            for ends in (self.ends_a, self.ends_b)
        )
        return Segments(
            self.ids_a[from_a : max(from_a, to_a)],
            self.ids_b[from_b : max(from_b, to_b)],
            self.ends_a[start:stop] - from_a,
            self.ends_b[start:stop] - from_b,
        )

    @override
    def __iter__(self) -> Iterator[Segment]:
        return map(Segment, _pieces(self.ids_a, self.ends_a), _pieces(self.ids_b, self.ends_b))

    @override
    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @override
    def __repr__(self) -> str:
        return f"Segments.of({list(self)})"

    __hash__ = None  # type: ignore[assignment]


def _array(values: Sequence[int]) -> Int[np.ndarray, " n"]:
    return np.array(values, dtype=np.int64)


def _pieces(
    ids: Int[np.ndarray, " tokens"], ends: Int[np.ndarray, " n"]
) -> Iterator[tuple[int, ...]]:
    all_ids, all_ends = tuple(ids.tolist()), ends.tolist()
    return (all_ids[a:b] for a, b in zip([0, *all_ends], all_ends, strict=False))
