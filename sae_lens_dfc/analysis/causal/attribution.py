"""Attribution: on which latents the divergence between two models' predictions depends, by
gradient."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.common_predictions import (
    ModelDifference,
    PairedTexts,
    paired_texts,
)
from sae_lens_dfc.analysis.causal.downstream import check_whole
from sae_lens_dfc.analysis.causal.shared_vocabulary import common_outcomes
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.models.config import OTHER, ModelName


def attribution(
    on: ModelDifference, batches: Iterable[PairedRows]
) -> dict[ModelName, Float[Tensor, " d_sae"]]:
    """By how many bits per pair the divergence would fall, to first order, if each latent's part of
    the models' difference were removed in model A, and in model B: taken out of the model that
    writes it, or added to the one that does not. One backward pass a model ranks all latents
    (attribution patching, arXiv 2310.10348).

    The first order is exact for small parts. Between models that are nearly equal the divergence is
    quadratic, and the sum over all latents is about twice what removing them together gives.

    Args:
        on: The models and their difference.
        batches: Rows with their contexts.

    Raises:
        ValueError: A model was loaded without its upper layers, or its probabilities are NaN.
    """
    check_whole(on.pair)
    crosscoder, models = on.crosscoder, on.pair.models
    outcomes = dict(zip(models, common_outcomes(on.pair.a, on.pair.b), strict=True))
    zeros = torch.zeros(crosscoder.cfg.d_sae, device=crosscoder.device)
    total: dict[ModelName, Tensor] = dict.fromkeys(models, zeros)
    n = 0
    for rows in tqdm(list(batches), "Attribution", leave=False):
        for part in paired_texts(on.pair, rows, outcomes):
            with torch.no_grad():
                feature_acts = crosscoder.encode(part.rows.acts.to(crosscoder.device)).float()
                before = {m: part.predictions(m) for m in models}
            for m in models:
                gradient = _gradient(part, m, before[OTHER[m]]).to(feature_acts)
                along = gradient @ on.own[m].to(feature_acts).T
                total[m] = total[m] + (along * feature_acts).sum(dim=0)
            n += len(part.compared)
    return {m: of_model / max(1, n) for m, of_model in total.items()}


def _gradient(
    part: PairedTexts, m: ModelName, other: Float[Tensor, "n outcomes"]
) -> Float[Tensor, "rows d_m"]:
    """Gradient of the summed divergence with respect to the model's activation at each row."""
    change = part.acts[m].new_zeros(len(part.rows.acts), part.acts[m].shape[-1])
    change.requires_grad_()
    with torch.enable_grad():
        own = part.predictions(m, change)
    with torch.no_grad():
        # The derivative of Jensen-Shannon's divergence in bits; 0 times infinity where p is 0.
        mean = (own + other.to(own)) / 2
        slope = ((own / mean).log2() / 2).where(own > 0, 0.0)
    [gradient] = torch.autograd.grad(own, change, slope)
    return gradient
