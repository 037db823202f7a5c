"""Which model a latent belongs to, from its decoder."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder

N_BINS = 20
ONE_SIDED = 0.8
"""Relative decoder norm above which (or, for B, below 1 - which) a latent counts as exclusive (arXiv 2602.11729, section 2.3)."""
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
    """Number of latents by partition, the leak, and how the shared latents' decoders share out between the models.

    `relative_decoder_norm/…`: median and extremes, and the shares that are one-sided (`one_sided_a` above 0.8, `one_sided_b` below
    0.2) or even (`even`, from 0.4 to 0.6).
    """
    shared = relative_decoder_norms(crosscoder)[crosscoder.partition.slices["shared"]]
    result: dict[str, float] = {
        f"latents/{n}": size for n, size in crosscoder.partition.sizes.items()
    }
    result["leak"] = crosscoder.leak()
    if len(shared) > 0:
        result["relative_decoder_norm/median"] = shared.median().item()
        result["relative_decoder_norm/min"] = shared.min().item()
        result["relative_decoder_norm/max"] = shared.max().item()
        bins = {
            "one_sided_a": shared > ONE_SIDED,
            "one_sided_b": shared < 1 - ONE_SIDED,
            "even": (shared >= 0.4) & (shared <= 0.6),
        }
        for name, inside in bins.items():
            result[f"relative_decoder_norm/{name}"] = inside.double().mean().item()
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
