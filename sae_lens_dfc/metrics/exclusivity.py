"""Which model a latent belongs to, from its decoder."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder

N_BINS = 20
MIN_COSINE = 0.8
"""Cosine of two directions above which they are one (arXiv 2602.11729, section 2.3)."""


@torch.no_grad()
def relative_decoder_norms(crosscoder: Crosscoder) -> Float[Tensor, " d_sae"]:
    """`norm_a / (norm_a + norm_b)` of each latent: 1 is A's alone, 0.5 is shared evenly, 0 is B's alone.

    arXiv 2602.11729, section 2.1; on the scale that both models had in training.
    """
    norms = crosscoder.decoder_norms()
    return norms[0] / norms.sum(dim=0).clamp(min=1e-12)


def decoder_metrics(crosscoder: Crosscoder) -> dict[str, float]:
    """Number of latents by partition, median and extremes of the shared ones' relative decoder norm, and the leak."""
    shared = relative_decoder_norms(crosscoder)[crosscoder.partition.slices["shared"]]
    result: dict[str, float] = {
        f"latents/{n}": size for n, size in crosscoder.partition.sizes.items()
    }
    result["leak"] = crosscoder.leak()
    if len(shared) > 0:
        result["relative_decoder_norm/median"] = shared.median().item()
        result["relative_decoder_norm/min"] = shared.min().item()
        result["relative_decoder_norm/max"] = shared.max().item()
    return result


def relative_norm_histogram(crosscoder: Crosscoder) -> dict[str, list[int]]:
    """Number of latents in each of 20 equal bins of the relative decoder norm, from 0 to 1, by partition."""
    relative = relative_decoder_norms(crosscoder).float().cpu()
    partition = crosscoder.partition
    return {
        name: [int(n) for n in torch.histc(relative[latents], bins=N_BINS, min=0, max=1)]
        for name, latents in partition.slices.items()
        if partition.sizes[name] > 0
    }
