"""Explains the divergence between a run's two models by its first latents, in two orders."""

import logging
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.attribution import attribution
from sae_lens_dfc.analysis.causal.common_predictions import ModelDifference
from sae_lens_dfc.analysis.causal.divergence import (
    BY_EVIDENCE,
    BY_GRADIENT,
    SIZES,
    Orders,
    divergence_explained,
)
from sae_lens_dfc.analysis.report.results import drop_nonfinite
from sae_lens_dfc.analysis.screening.causal_tests import Subject
from sae_lens_dfc.models.config import ModelName

logger = logging.getLogger(__name__)


def explained_divergence(
    on: Subject, order: Sequence[int], n_pairs: int, seed: int
) -> dict[str, float]:
    """How much of the divergence the first latents explain, in the order in which the screening
    tests them and in that of the gradient. The gradient is taken on other text, so that it selects
    nothing on the text that it is judged by.

    Args:
        on: The crosscoder with its whole models and held-out text.
        order: The latents that could be a difference, those to test first.
        n_pairs: About how many pairs to measure it on, and as many for the gradient; 0 measures
            nothing.
        seed: Seed of the random directions.
    """
    if n_pairs == 0:
        return {}
    texts = list(on.data.held_out_with_text(2 * n_pairs))
    if len(texts) < 2:
        logger.warning(
            "The divergence between the models' predictions is not explained: the held-out text is one batch, and the gradient needs text of its own"
        )
        return {}
    own: dict[ModelName, Tensor] = {"a": on.own[0], "b": on.own[1]}
    difference = ModelDifference(on.crosscoder, on.pair, own, on.affine_maps)
    slopes = attribution(difference, texts[::2])
    orders: Orders = {
        BY_EVIDENCE: dict.fromkeys(slopes, order[: max(SIZES)]),
        BY_GRADIENT: {m: _steepest(slope, order) for m, slope in slopes.items()},
    }
    found = divergence_explained(difference, texts[1::2], orders, on.data.moments(), seed)
    return drop_nonfinite(found)


def _steepest(slope: Float[Tensor, " d_sae"], among: Sequence[int]) -> list[int]:
    """The latents by which the divergence falls most."""
    of_each = slope[list(among)].cpu()
    order = of_each.argsort(descending=True)[: max(SIZES)]
    return [among[i] for i in order.tolist() if of_each[i] > 0]
