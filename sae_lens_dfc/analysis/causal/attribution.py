"""Attribution: on which latents the divergence between two models' predictions depends, by
gradient."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.common_predictions import PairedTexts, paired_texts
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps


def attribution(
    crosscoder: Crosscoder,
    pair: ModelPair,
    batches: Iterable[PairedRows],
    affine_maps: AffineMaps | None,
) -> Float[Tensor, " d_sae"]:
    """By how many bits per pair the divergence would fall, to first order, if what each latent
    writes in one model and not in the other were taken away there; the mean over changing A and
    changing B. One backward pass ranks all latents (attribution patching, arXiv 2310.10348).

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole: not with `drop_unused_layers`.
        batches: Rows with their contexts.
        affine_maps: Affine maps between the models; none if both share one basis.

    Raises:
        ValueError: A model was loaded without its upper layers.
    """
    own = dict(zip(pair.models, both_decoder_differences(crosscoder, affine_maps), strict=True))
    total, n = torch.zeros(crosscoder.cfg.d_sae, device=crosscoder.device), 0
    for part in paired_texts(pair, batches, "Attribution"):
        with torch.no_grad():
            feature_acts = crosscoder.encode(part.rows.acts.to(crosscoder.device)).float()
            before = {m: part.predictions(m) for m in pair.models}
        for m in pair.models:
            gradient = _gradient(part, m, before[OTHER[m]]).to(feature_acts)
            total += ((gradient @ own[m].float().T) * feature_acts).sum(dim=0) / 2
        n += len(part.rows.acts)
    return total / max(1, n)


def _gradient(
    part: PairedTexts, m: ModelName, other: Float[Tensor, "n outcomes"]
) -> Float[Tensor, "n d_m"]:
    """Gradient of the summed divergence with respect to the model's activation at each row."""
    change = part.acts[m].new_zeros(len(part.rows.acts), part.acts[m].shape[-1])
    change.requires_grad_()
    with torch.enable_grad():
        own = part.predictions(m, change)
    with torch.no_grad():
        # The derivative of Jensen-Shannon's divergence in bits; 0 times infinity where p is 0.
        mean = (own + other) / 2
        slope = ((own / mean).log2() / 2).where(own > 0, 0.0)
    [gradient] = torch.autograd.grad(own, change, slope)
    return gradient
