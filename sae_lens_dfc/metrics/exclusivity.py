"""Which model a latent belongs to, from its decoder."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.stitching import Stitching

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


@torch.no_grad()
def decoder_cosines(crosscoder: Crosscoder, stitching: Stitching) -> dict[str, float]:
    """Cosine of each shared latent's decoder in B with its decoder in A moved there, and the reverse: median and quantiles.

    `decoder_cosine/a_to_b` is the median over the shared latents, `/p5` and `/p95` the 5th and 95th percentile. A latent that is
    one thing in both models is near 1, as far as the map is good.
    """
    shared = crosscoder.W_dec[crosscoder.partition.slices["shared"]].float()
    if len(shared) == 0:
        return {}
    in_a, in_b = (shared[:, m] for m in crosscoder.partition.models.values())
    cosines = {
        "a_to_b": cosine_similarity(stitching.direction_to_b(in_a), in_b),
        "b_to_a": cosine_similarity(stitching.direction_to_a(in_b), in_a),
    }
    return {
        key: value
        for name, cosine in cosines.items()
        for key, value in quantiles(f"decoder_cosine/{name}", cosine).items()
    }


def quantiles(name: str, values: Float[Tensor, " n"]) -> dict[str, float]:
    """The median under the name, the 5th and 95th percentile under `/p5` and `/p95`; nothing where all are NaN.

    >>> quantiles("x", torch.arange(101.0))
    {'x': 50.0, 'x/p5': 5.0, 'x/p95': 95.0}
    """
    known = values[~values.isnan()].double()
    if len(known) == 0:
        return {}
    at = {name: 0.5, f"{name}/p5": 0.05, f"{name}/p95": 0.95}
    return {key: known.quantile(q).item() for key, q in at.items()}


def relative_norm_histogram(crosscoder: Crosscoder) -> dict[str, list[int]]:
    """Number of latents in each of 20 equal bins of the relative decoder norm, from 0 to 1, by partition."""
    relative = relative_decoder_norms(crosscoder).float().cpu()
    partition = crosscoder.partition
    return {
        name: [int(n) for n in torch.histc(relative[latents], bins=N_BINS, min=0, max=1)]
        for name, latents in partition.slices.items()
        if partition.sizes[name] > 0
    }
