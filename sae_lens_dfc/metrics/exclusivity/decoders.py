"""Decoder-based metrics: relative decoder norms, cosines and differences between the two models'
decoders."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sae_lens_dfc.crosscoders.groups import SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.stats.affine_maps import AffineMaps

NORM_BINS = 20
ONE_SIDED = 0.8
"""Relative decoder norm above which a latent counts as A-exclusive; below 1 minus it, as
B-exclusive (arXiv 2602.11729, section 2.3)."""
TWO_SIDED = 0.7
"""Relative decoder norm up to which (and down to 1 minus which) a latent is clearly in both
models."""
MIN_COSINE = 0.8
"""Cosine above which two directions count as the same (arXiv 2602.11729, section 2.3)."""


@torch.no_grad()
def relative_decoder_norms(crosscoder: Crosscoder) -> Float[Tensor, " d_sae"]:
    """`norm_a / (norm_a + norm_b)` of each latent: 1 is A only, 0.5 is both equally, 0 is B only.

    arXiv 2602.11729, section 2.1; on the normalized scale of training. 0.5 if both decoders are 0.
    """
    norms = crosscoder.decoder_norms()
    total = norms.sum(dim=0)
    return torch.where(total > 0, norms[0] / total, 0.5)


@torch.no_grad()
def candidate_latents(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Latents of the exclusive partitions, and those whose decoder has all but vanished in one
    model."""
    relative = relative_decoder_norms(crosscoder)
    is_candidate = (relative > ONE_SIDED) | (relative < 1 - ONE_SIDED)
    is_candidate[: crosscoder.partition.slices[SHARED].start] = True
    return is_candidate


def two_sided_latents(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Latents that both models clearly have."""
    relative = relative_decoder_norms(crosscoder)
    is_between = (relative <= TWO_SIDED) & (relative >= 1 - TWO_SIDED)
    return is_between & ~candidate_latents(crosscoder)


def moved_decoders(
    crosscoder: Crosscoder, affine_maps: AffineMaps | None, latents: Sequence[int] | None = None
) -> tuple[Float[Tensor, "n_latents d_b"], Float[Tensor, "n_latents d_a"]]:
    """Each latent's decoder in A mapped to B, and its decoder in B mapped to A, in raw units.

    Norms are preserved, on the normalized scale of training. A least-squares map shrinks directions
    that it cannot predict, down to 0 for features that the other model lacks, and metrics along a
    direction must not depend on that shrinkage.

    Args:
        crosscoder: The saved crosscoder.
        affine_maps: Affine maps for directions; none uses directions unchanged, which is meaningful
            only if the models share a basis, as a model and its fine-tune.
        latents: Indices of the latents; none uses all.

    Raises:
        ValueError: Without a map the two widths differ.
    """
    chosen = (
        slice(None)
        if latents is None
        else torch.tensor(latents, dtype=torch.long, device=crosscoder.device)
    )
    W_dec = crosscoder.W_dec[chosen].float()
    to_b, to_a = (W_dec[:, m] for m in crosscoder.partition.models.values())
    _check_widths(crosscoder, affine_maps)
    if affine_maps is not None:
        to_b, to_a = affine_maps.direction_to_b(to_b), affine_maps.direction_to_a(to_a)
    norms, scale = crosscoder.decoder_norms()[:, chosen, None], crosscoder.input_scale
    unit_b, unit_a = (normalize(x, eps=torch.finfo(x.dtype).tiny) for x in (to_b, to_a))
    return unit_b * (norms[0] / scale[1]).float(), unit_a * (norms[1] / scale[0]).float()


def _check_widths(crosscoder: Crosscoder, affine_maps: AffineMaps | None) -> None:
    d_a, d_b = crosscoder.cfg.d_a, crosscoder.cfg.d_b
    if affine_maps is None and d_a != d_b:
        raise ValueError(
            f"A direction of width {d_a} cannot be used as one of width {d_b}. Give `affine_maps`."
        )


@torch.no_grad()
def both_decoder_differences(
    crosscoder: Crosscoder, affine_maps: AffineMaps | None = None
) -> tuple[Float[Tensor, "d_sae d_a"], Float[Tensor, "d_sae d_b"]]:
    """For each latent, `d_a` minus B's decoder mapped to A, and `d_b` minus A's mapped to B: each
    model's own part, in its raw units.

    It is the decoder of a latent that is exclusive to the model, and 0 for a latent with the same
    decoder in both. The latent's activation times it is the part of the models' activation
    difference that the latent explains.

    Args:
        crosscoder: The saved crosscoder.
        affine_maps: See `moved_decoders`; without maps, the decoders are used unchanged, including
            their norms.

    Raises:
        ValueError: Without a map the two widths differ.
    """
    in_a, in_b, to_a, to_b = _all_decoders(crosscoder, affine_maps)
    return in_a - to_a, in_b - to_b


def _all_decoders(
    crosscoder: Crosscoder, affine_maps: AffineMaps | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decoders in A and in B, and B's mapped to A and A's to B; unchanged without maps."""
    _check_widths(crosscoder, affine_maps)
    in_a, in_b = (crosscoder.W_dec.float()[:, m] for m in crosscoder.partition.models.values())
    to_b, to_a = moved_decoders(crosscoder, affine_maps) if affine_maps else (in_a, in_b)
    return in_a, in_b, to_a, to_b


@torch.no_grad()
def relative_decoder_differences(
    crosscoder: Crosscoder, affine_maps: AffineMaps | None = None
) -> Float[Tensor, " d_sae"]:
    """`|d_b - d_a| / (|d_a| + |d_b|)` of each latent: 1 for one model only or opposite directions,
    0 for the same decoder in both.

    The relative norm (`relative_decoder_norms`) misses a latent whose decoders have equal norms but
    different directions, as when a narrow fine-tune rotates an existing latent.

    Args:
        crosscoder: The saved crosscoder.
        affine_maps: See `both_decoder_differences`.
    """
    _, in_b, _, to_b = _all_decoders(crosscoder, affine_maps)
    return relative_difference(to_b, in_b)


def relative_difference(
    x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """`|y - x| / (|x| + |y|)`, 0 if both are 0.

    >>> relative_difference(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
    tensor([0.7143, 1.0000])
    """
    total = x.norm(dim=-1) + y.norm(dim=-1)
    return torch.where(total == 0, 0.0, (y - x).norm(dim=-1) / total)


def decoder_metrics(crosscoder: Crosscoder) -> dict[str, float]:
    """Number of latents by partition, the largest forbidden weight, and the shared latents' relative decoder norms.

    `relative_decoder_norm/…`: median, minimum and maximum, and the fractions that are one-sided
    (`one_sided_a` above 0.8, `one_sided_b` below 0.2) or even (`even`, from 0.4 to 0.6).
    """
    shared = relative_decoder_norms(crosscoder)[crosscoder.partition.slices["shared"]]
    result: dict[str, float] = {
        f"latents/{n}": size for n, size in crosscoder.partition.sizes.items()
    }
    result["max_forbidden_weight"] = crosscoder.max_forbidden_weight()
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
def decoder_cosines(crosscoder: Crosscoder, affine_maps: AffineMaps) -> dict[str, float]:
    """Cosine of each shared latent's decoder in B with its decoder in A mapped to B, and the
    reverse: median and quantiles.

    `decoder_cosine/a_to_b` is the median over the shared latents, `/p5` and `/p95` the 5th and 95th
    percentile. A latent that is the same in both models is near 1, if the map is accurate.
    """
    shared = crosscoder.W_dec[crosscoder.partition.slices["shared"]].float()
    if len(shared) == 0:
        return {}
    in_a, in_b = (shared[:, m] for m in crosscoder.partition.models.values())
    cosines = {
        "a_to_b": _cosines(affine_maps.direction_to_b(in_a), in_b),
        "b_to_a": _cosines(affine_maps.direction_to_a(in_b), in_a),
    }
    return {
        key: value
        for name, cosine in cosines.items()
        for key, value in quantiles(f"decoder_cosine/{name}", cosine).items()
    }


@torch.no_grad()
def encoder_decoder_cosines(
    crosscoder: Crosscoder, latents: Sequence[int]
) -> dict[str, Float[Tensor, " _"]]:
    """For each model (`a`, `b`) the cosine of each latent's encoder and decoder; 0 if either is 0.

    The normalization scale does not affect it. Near 1, a latent reads along its decoder direction;
    a small cosine means that it reads something other than it writes, or subtracts much that other
    latents write.
    """
    rows = list(latents)
    return {
        m: _cosines(crosscoder.W_enc[inputs, :][:, rows].T, crosscoder.W_dec[rows, inputs])
        for m, inputs in crosscoder.partition.models.items()
    }


def _cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine independent of units, in which a decoder may be very short; 0 if either vector is
    0."""
    return cosine_similarity(x.double(), y.double(), eps=torch.finfo(torch.double).tiny).float()


def quantiles(name: str, values: Float[Tensor, " n"]) -> dict[str, float]:
    """The median under the name, the 5th and 95th percentile under `/p5` and `/p95`; empty if all
    are NaN.

    >>> quantiles("x", torch.arange(101.0))
    {'x': 50.0, 'x/p5': 5.0, 'x/p95': 95.0}
    """
    known = values[~values.isnan()].double()
    if len(known) == 0:
        return {}
    at = {name: 0.5, f"{name}/p5": 0.05, f"{name}/p95": 0.95}
    return {key: known.quantile(q).item() for key, q in at.items()}


def relative_norm_histogram(crosscoder: Crosscoder) -> dict[str, list[int]]:
    """Number of latents in each of 20 equal bins of the relative decoder norm, from 0 to 1, by
    partition."""
    relative = relative_decoder_norms(crosscoder).float().cpu()
    partition = crosscoder.partition
    return {
        name: [int(n) for n in torch.histc(relative[latents], bins=NORM_BINS, min=0, max=1)]
        for name, latents in partition.slices.items()
        if partition.sizes[name] > 0
    }
