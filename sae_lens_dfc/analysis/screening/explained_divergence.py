"""Explains a run's divergence between the models' predictions by its first latents, in two orders."""

import logging

from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.attribution import attribution
from sae_lens_dfc.analysis.causal.divergence import (
    BY_GRADIENT,
    BY_SIZE,
    SIZES,
    Explaining,
    divergence_explained,
)
from sae_lens_dfc.analysis.screening.causal_tests import Subject

logger = logging.getLogger(__name__)


def explained_divergence(
    on: Subject, made: Float[Tensor, " d_sae"], n_pairs: int, seed: int
) -> dict[str, float]:
    """How much of the divergence the first latents explain, ordered by the size of the difference
    that they make, and by gradient. The gradient is taken on other text, so that it selects nothing
    on the text that it is judged by.

    Args:
        on: The crosscoder with its whole models and held-out text.
        made: Size of the difference that each latent makes; see `differences_made`.
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
    explaining = Explaining(on.crosscoder, on.pair, on.data.moments(), on.affine_maps)
    by_gradient = attribution(on.crosscoder, on.pair, texts[::2], on.affine_maps).cpu()
    orders = {
        name: value.argsort(descending=True)[: max(SIZES)].tolist()
        for name, value in {BY_SIZE: made, BY_GRADIENT: by_gradient}.items()
    }
    return divergence_explained(explaining, texts[1::2], orders, seed)
