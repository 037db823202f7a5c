"""An aligned text -> rows of activations `(n, d_a + d_b)`, without the positions that would spoil them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_dfc.alignment import Coverage, Segment, pack
from sae_lens_dfc.pair import ModelPair, segment_ends
from sae_lens_dfc.texts import split_text

# Long enough for any sentence-level effect, short enough for tokenizers that take quadratic time.
MAX_CHARS = 20_000
# Norms kept for the running median: its error is then about 1 %.
N_NORMS = 10_000


@dataclass
class PairCounts:
    """What became of the text: tokens paired or not, and pairs used or not."""

    coverage: Coverage = field(default_factory=Coverage)
    texts: int = 0
    """Documents read."""
    pairs: int = 0
    """Pairs of activations handed on."""
    first_position: int = 0
    """Pairs left out because one of the two stands at position 0 of its context."""
    outlier: int = 0
    """Pairs left out because one norm is above `outlier_factor` times its model's median."""


class PairedRows(NamedTuple):
    """Rows of activations and where each came from."""

    acts: Float[Tensor, "n d_in"]
    """Model A's activations, then model B's."""
    context: Int[Tensor, " n"]
    """Number of the context, counted from 0."""
    segment: Int[Tensor, " n"]
    """Number of the segment in its context."""


def aligned_contexts(
    pair: ModelPair, texts: Iterable[str], context_size: int, counts: PairCounts
) -> Iterator[list[Segment]]:
    """Texts -> contexts of at most `context_size` tokens in either model, each starting as `pair.bos_segment` says."""
    bos = pair.bos_segment
    room = context_size - 1
    for text in texts:
        counts.texts += 1
        for piece in split_text(text, MAX_CHARS):
            segments, coverage = pair.segments(piece)
            counts.coverage.add(coverage)
            for context in pack(segments, room, counts.coverage):
                yield [bos, *context]


def paired_activations(
    pair: ModelPair,
    contexts: Iterable[Sequence[Segment]],
    counts: PairCounts,
    batch_size_prompts: int = 16,
    outlier_factor: float = 2.0,
) -> Iterator[PairedRows]:
    """Contexts -> rows of both models' activations, in the order of the text.

    Position 0 is left out by position, not by token: it is an outlier whatever stands there. A pair
    is left out when either side's norm is over `outlier_factor` times its model's running median
    (arXiv 2602.11729, appendix B.1.4).

    Args:
        pair: The two models.
        contexts: Segments of text, each list one context.
        counts: Where to count what was used and what was not.
        batch_size_prompts: Contexts in one forward pass.
        outlier_factor: How far above the median a norm may be; infinity keeps all.
    """
    iterator = iter(contexts)
    seen = 0
    medians = [_RunningMedian(), _RunningMedian()]
    while batch := list(islice(iterator, batch_size_prompts)):
        acts = torch.cat(pair.activations(batch))
        _check_finite(acts, pair)
        later = torch.cat([_after_first_position(context) for context in batch]).to(acts.device)
        ordinary = later & _ordinary(acts, later, pair.d_a, medians, outlier_factor)
        context = torch.cat([torch.full((len(c),), seen + i) for i, c in enumerate(batch)])
        segment = torch.cat([torch.arange(len(c)) for c in batch])
        is_text = segment > 0
        counts.first_position += int((is_text & ~later.cpu()).sum())
        counts.outlier += int((later & ~ordinary).sum())
        counts.pairs += int(ordinary.sum())
        seen += len(batch)
        where = ordinary.cpu()
        yield PairedRows(acts[ordinary], context[where], segment[where])


def _check_finite(acts: Tensor, pair: ModelPair) -> None:
    # One NaN would make the running median NaN, and every later pair an outlier.
    for x, which in ((acts[:, : pair.d_a], "a"), (acts[:, pair.d_a :], "b")):
        if not x.isfinite().all():
            raise ValueError(
                f"Model {which}'s activations are not all finite numbers. Load it in another dtype: "
                "float16 overflows in some models where bfloat16 does not."
            )


def _after_first_position(context: Sequence[Segment]) -> Bool[Tensor, " n_segments"]:
    ends_a = torch.tensor(segment_ends([s.ids_a for s in context]))
    ends_b = torch.tensor(segment_ends([s.ids_b for s in context]))
    return (ends_a > 0) & (ends_b > 0)


def _ordinary(
    acts: Tensor, use: Tensor, d_a: int, medians: Sequence["_RunningMedian"], factor: float
) -> Bool[Tensor, " n"]:
    ordinary = torch.ones_like(use)
    for x, median in zip((acts[:, :d_a], acts[:, d_a:]), medians, strict=True):
        norms = x.norm(dim=-1)
        median.update(norms[use])
        ordinary &= norms <= factor * median.compute()
    return ordinary


class _RunningMedian:
    """Median of the last `N_NORMS` values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=N_NORMS)

    def update(self, values: Tensor) -> None:
        self._values.extend(values.tolist())

    def compute(self) -> float:
        return float(torch.tensor(self._values).median()) if self._values else 0.0
