"""Runs both models on batches of contexts and yields activation rows `(n, d_a + d_b)`, without
position 0, outliers and non-finite values."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair

# Norms kept for the running median, whose error is then about 1 %.
N_NORMS = 10_000


class RunningMedian:
    """Median of the last `N_NORMS` values."""

    def __init__(self, values: Float[Tensor, " n"] | None = None):
        self.values = torch.zeros(0) if values is None else values
        """The stored values, oldest first."""

    def update(self, values: Float[Tensor, " n"]) -> None:
        """Add values and drop the oldest."""
        self.values = torch.cat([self.values, values.float().cpu()])[-N_NORMS:]

    def compute(self) -> float:
        """The median; 0 if there are no values."""
        return float(self.values.median()) if len(self.values) > 0 else 0.0


MAX_NOT_FINITE = 0.01
"""Share of pairs with a NaN or an infinity above which an error is raised."""
# Counts kept per batch; those of the text are updated for a whole pool of batches at once.
COUNTED_HERE = ("pairs", "first_position", "outlier", "outlier_a", "outlier_b", "not_finite")
# Missing in checkpoints of earlier versions.
COUNTED_SINCE = ("not_finite_a", "not_finite_b")
# With fewer pairs, a few non-finite rows would exceed that share.
MIN_PAIRS_TO_JUDGE = 1_000


@dataclass(frozen=True)
class StreamState:
    """Resumable position of a stream: a stream started from it yields exactly what would have come
    next."""

    values: dict[str, Any] = field(default_factory=dict)
    """Values that JSON can hold."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """A non-negative integer among the values.

        Raises:
            ValueError: There is none of that name, because the state is of another stream or was
                altered.
        """
        value = self.values.get(name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"The state to resume from has {value!r:.80} as {name!r}, not a number."
            )
        return value


class StatefulBatch(NamedTuple):
    """A batch of activation rows and the state to resume from after it."""

    acts: Float[Tensor, "n d_in"]
    after: StreamState


class PairedRows(NamedTuple):
    """Activation rows and the context and segment that each came from."""

    acts: Float[Tensor, "n d_in"]
    """Model A's activations, then model B's."""
    context: Int[Tensor, " n"]
    """Number of the context, from 0."""
    segment: Int[Tensor, " n"]
    """Number of the segment in its context, from 0."""
    contexts: Sequence[Context] = ()
    """The contexts that the rows come from."""
    after: StreamState = StreamState()
    """State to resume from after these rows."""


def rows_in(rows: PairedRows, contexts: Sequence[Context]) -> tuple[PairedRows, Bool[Tensor, " n"]]:
    """The rows of these contexts, and a mask of them."""
    numbers = torch.tensor([context.number for context in contexts], dtype=torch.long)
    here = torch.isin(rows.context, numbers)
    acts = rows.acts[here.to(rows.acts.device)]
    return PairedRows(acts, rows.context[here], rows.segment[here], contexts), here


def paired_activations(
    pair: ModelPair,
    batches: Iterable[ContextBatch],
    counts: PairCounts,
    outlier_factor: float = 2.0,
    start: StreamState | None = None,
) -> Iterator[PairedRows]:
    """Run both models on batches of contexts and yield their activation rows.

    Position 0 is dropped by position, not by token, because its activation is an outlier whatever
    the token is. A pair is also dropped if either norm exceeds `outlier_factor` times its model's
    running median (arXiv 2602.11729, appendix B.1.4), or if any of its values is NaN or infinite.

    Args:
        pair: The two models.
        batches: Contexts, each batch one forward pass.
        counts: Counts of used and dropped pairs, updated in place.
        outlier_factor: Largest allowed ratio of a norm to the median; infinity keeps all.
        start: State at which `batches` begin, if not at the start of the text.

    Raises:
        ValueError: More than 1 % of the pairs are not finite.
    """
    medians = [RunningMedian(), RunningMedian()]
    if start is not None:
        medians = _resumed(start, counts)
    for batch in batches:
        yield _rows(pair, batch, counts, medians, outlier_factor)
    _check_finite(pair, counts, at_least=0)


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
    finite_a = acts[:, : pair.d_a].isfinite().all(dim=-1)
    finite_b = acts[:, pair.d_a :].isfinite().all(dim=-1)
    finite = finite_a & finite_b
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
    counts.not_finite_a += int((later & ~finite_a).sum())
    counts.not_finite_b += int((later & ~finite_b).sum())
    counts.outlier += int((usable & ~ordinary).sum())
    counts.outlier_a += int((usable & ~ordinary_a).sum())
    counts.outlier_b += int((usable & ~ordinary_b).sum())
    counts.pairs += int(ordinary.sum())
    _check_finite(pair, counts, at_least=MIN_PAIRS_TO_JUDGE)
    where = ordinary.cpu()
    done = {name: getattr(counts, name) for name in (*COUNTED_HERE, *COUNTED_SINCE)}
    after = StreamState(
        {"text": batch.after, "rows": done},
        {"norms_a": medians[0].values, "norms_b": medians[1].values},
    )
    return PairedRows(acts[ordinary], context[where], segment[where], batch.contexts, after)


def _resumed(start: StreamState, counts: PairCounts) -> list[RunningMedian]:
    """Restore the running medians and `counts` from a state, which may come from an untrusted
    file."""
    done = start.values.get("rows")
    norms = [start.tensors.get(name) for name in ("norms_a", "norms_b")]
    done = {**dict.fromkeys(COUNTED_SINCE, 0), **done} if isinstance(done, dict) else done
    names = (*COUNTED_HERE, *COUNTED_SINCE)
    if not isinstance(done, dict) or not all(isinstance(done.get(n), int) for n in names):
        raise ValueError(
            f"The state to resume from lacks the counts of earlier rows, got {done!r:.80}."
        )
    if not all(x is not None and x.ndim == 1 and x.is_floating_point() for x in norms):
        raise ValueError("The state to resume from lacks the norms of earlier activations.")
    for name in names:
        setattr(counts, name, done[name])
    return [RunningMedian(x) for x in norms]


def _check_finite(pair: ModelPair, counts: PairCounts, at_least: int) -> None:
    seen = counts.pairs + counts.outlier + counts.not_finite
    if counts.not_finite > MAX_NOT_FINITE * seen and seen >= at_least:
        shares = {"A": counts.not_finite_a, "B": counts.not_finite_b}
        blamed = [name for name, n in shares.items() if n > 0]
        models = dict(zip("AB", (pair.a, pair.b), strict=True))
        why = ". ".join(
            _why_not_finite(name, shares[name], models[name].name, models[name].model)
            for name in blamed
        )
        # Checkpoints of earlier versions do not count them per model.
        why = why or "Load the models in another dtype"
        raise ValueError(
            f"{counts.not_finite} of {seen} pairs of activations hold NaN or infinity. {why}."
        )


def _why_not_finite(which: str, n: int, name: str, model: nn.Module) -> str:
    said = f"Model {which} ({name!r}) computes {n} of them"
    weights = dict(model.named_parameters())
    broken = [key for key, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        first = broken[0].replace("_original_component.", "")
        return (
            f"{said}, and its weights hold NaN or infinity themselves: {len(broken)} of {len(weights)} tensors, the first is "
            f"{first!r:.200}. Get its checkpoint again, and its adapter if it is one"
        )
    return f"{said}. Load it in another dtype: float16 overflows in some models where bfloat16 does not"


def after_first_position(context: Segments) -> Bool[Tensor, " n_segments"]:
    """Whether each segment's pair is after position 0 in both models."""
    return torch.from_numpy((context.last_a > 0) & (context.last_b > 0))


def _ordinary(
    norms: Float[Tensor, " n"], use: Bool[Tensor, " n"], median: RunningMedian, factor: float
) -> Bool[Tensor, " n"]:
    median.update(norms[use])
    return norms <= factor * median.compute()


def origins(rows: PairedRows) -> dict[str, Int[Tensor, " n"]]:
    """For each row, its source and document, and its position and token in each model.

    Positions are in the context and count the beginning-of-sequence token.
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
