"""Batches of contexts -> rows of activations `(n, d_a + d_b)`, without the positions that would spoil them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_dfc.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.norms import RunningMedian
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments

MAX_NOT_FINITE = 0.01
"""Share of pairs with a NaN or an infinity above which a model is taken to be broken."""
# What the contexts count is for a whole pool of batches at once; these are up to date after each batch.
COUNTED_HERE = ("pairs", "first_position", "outlier", "outlier_a", "outlier_b", "not_finite")
# Below this many pairs one bad row would be more than that share.
MIN_PAIRS_TO_JUDGE = 1_000


@dataclass(frozen=True)
class Bookmark:
    """Where a stream stands; a stream that starts there goes on as if it had never stopped."""

    values: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """A whole number of the values.

        Raises:
            ValueError: There is none of that name: the bookmark is of another stream, or was altered.
        """
        value = self.values.get(name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"The place to go on from has {value!r:.80} as {name!r}, not a number."
            )
        return value


class Marked(NamedTuple):
    """A batch of rows of activations, and where the next one begins."""

    acts: Float[Tensor, "n d_in"]
    after: Bookmark


class PairedRows(NamedTuple):
    """Rows of activations and where each came from."""

    acts: Float[Tensor, "n d_in"]
    """Model A's activations, then model B's."""
    context: Int[Tensor, " n"]
    """Number of the context, counted from 0."""
    segment: Int[Tensor, " n"]
    """Number of the segment in its context."""
    contexts: Sequence[Context] = ()
    """The contexts they are from."""
    after: Bookmark = Bookmark()
    """Where the next rows begin."""


def paired_activations(
    pair: ModelPair,
    batches: Iterable[ContextBatch],
    counts: PairCounts,
    outlier_factor: float = 2.0,
    start: Bookmark | None = None,
) -> Iterator[PairedRows]:
    """Batches of contexts -> rows of both models' activations.

    Position 0 is left out by position, not by token: it is an outlier whatever stands there. A pair
    is left out when either side's norm is over `outlier_factor` times its model's running median
    (arXiv 2602.11729, appendix B.1.4), or when any number in it is NaN or infinite.

    Args:
        pair: The two models.
        batches: Contexts, each batch one forward pass.
        counts: Where to count what was used and what was not.
        outlier_factor: How far above the median a norm may be; infinity keeps all.
        start: Where `batches` begin, when not at the beginning.

    Raises:
        ValueError: More than 1 % of the pairs are not finite.
    """
    medians = [RunningMedian(), RunningMedian()]
    if start is not None:
        medians = _resumed(start, counts)
    for batch in batches:
        yield _rows(pair, batch, counts, medians, outlier_factor)
    _check_finite(counts, at_least=0)


def _rows(
    pair: ModelPair,
    batch: ContextBatch,
    counts: PairCounts,
    medians: Sequence[RunningMedian],
    outlier_factor: float,
) -> PairedRows:
    contexts = [context.segments for context in batch.contexts]
    acts = torch.cat(pair.activations(contexts))
    later = torch.cat([after_first_position(context) for context in contexts]).to(acts.device)
    finite = acts.isfinite().all(dim=-1)
    usable = later & finite
    norms = acts[:, : pair.d_a].norm(dim=-1), acts[:, pair.d_a :].norm(dim=-1)
    ordinary_a, ordinary_b = (
        _ordinary(n, usable, median, outlier_factor)
        for n, median in zip(norms, medians, strict=True)
    )
    ordinary = usable & ordinary_a & ordinary_b
    lengths = torch.tensor([len(context) for context in contexts])
    context = torch.tensor([c.number for c in batch.contexts]).repeat_interleave(lengths)
    segment = torch.cat([torch.arange(n) for n in lengths.tolist()])
    counts.first_position += int(((segment > 0) & ~later.cpu()).sum())
    counts.not_finite += int((later & ~finite).sum())
    counts.outlier += int((usable & ~ordinary).sum())
    counts.outlier_a += int((usable & ~ordinary_a).sum())
    counts.outlier_b += int((usable & ~ordinary_b).sum())
    counts.pairs += int(ordinary.sum())
    _check_finite(counts, at_least=MIN_PAIRS_TO_JUDGE)
    where = ordinary.cpu()
    done = {name: getattr(counts, name) for name in COUNTED_HERE}
    after = Bookmark(
        {"text": batch.after, "rows": done},
        {"norms_a": medians[0].values, "norms_b": medians[1].values},
    )
    return PairedRows(acts[ordinary], context[where], segment[where], batch.contexts, after)


def _resumed(start: Bookmark, counts: PairCounts) -> list[RunningMedian]:
    """The medians at a place, which may come from somebody else's file; `counts` takes what was counted before it."""
    done = start.values.get("rows")
    norms = [start.tensors.get(name) for name in ("norms_a", "norms_b")]
    if not isinstance(done, dict) or not all(isinstance(done.get(n), int) for n in COUNTED_HERE):
        raise ValueError(
            f"The place to go on from does not say what was counted before it: {done!r:.80}."
        )
    if not all(x is not None and x.ndim == 1 and x.is_floating_point() for x in norms):
        raise ValueError("The place to go on from has no norms of the activations before it.")
    for name in COUNTED_HERE:
        setattr(counts, name, done[name])
    return [RunningMedian(x) for x in norms]


def _check_finite(counts: PairCounts, at_least: int) -> None:
    seen = counts.pairs + counts.outlier + counts.not_finite
    if counts.not_finite > MAX_NOT_FINITE * seen and seen >= at_least:
        raise ValueError(
            f"{counts.not_finite} of {seen} pairs of activations hold NaN or infinity. Load the models in another "
            "dtype: float16 overflows in some where bfloat16 does not."
        )


def after_first_position(context: Segments) -> Bool[Tensor, " n_segments"]:
    """Whether a segment's pair stands at position 0 in neither model."""
    return torch.from_numpy((context.last_a > 0) & (context.last_b > 0))


def _ordinary(
    norms: Float[Tensor, " n"], use: Bool[Tensor, " n"], median: RunningMedian, factor: float
) -> Bool[Tensor, " n"]:
    median.update(norms[use])
    return norms <= factor * median.compute()


def origins(rows: PairedRows) -> dict[str, Int[Tensor, " n"]]:
    """For each row: source and document, and in each model the position in its context and the token.

    Positions count the beginning-of-sequence token.
    """
    columns: dict[str, list[Tensor]] = {}
    for context in rows.contexts:
        at = rows.segment[rows.context == context.number].numpy()
        segments = context.segments
        of_context = {
            "source": np.full(len(at), context.source),
            "document": np.full(len(at), context.document),
            "position_a": segments.last_a[at],
            "position_b": segments.last_b[at],
            "token_a": segments.ids_a[segments.last_a[at]],
            "token_b": segments.ids_b[segments.last_b[at]],
        }
        for name, values in of_context.items():
            columns.setdefault(name, []).append(torch.from_numpy(values))
    return {name: torch.cat(values) for name, values in columns.items()}
