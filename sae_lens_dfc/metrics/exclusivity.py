"""Which model a latent belongs to, from its decoder."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

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

    arXiv 2602.11729, section 2.1; on the scale that both models had in training. A latent without a decoder in either is
    nobody's alone: 0.5.
    """
    norms = crosscoder.decoder_norms()
    total = norms.sum(dim=0)
    return torch.where(total > 0, norms[0] / total, 0.5)


def moved_decoders(
    crosscoder: Crosscoder, stitching: Stitching | None, latents: Sequence[int] | None = None
) -> tuple[Float[Tensor, "n_latents d_b"], Float[Tensor, "n_latents d_a"]]:
    """Each latent's decoder in A as a direction of B, and that in B as one of A, in raw units.

    It is as long as where it comes from, on the scale that both models had in training: a map fitted by least squares
    shrinks what it cannot tell, down to nothing for what the other model does not have, and what is measured along a
    direction must not depend on how much.

    Args:
        crosscoder: The saved crosscoder.
        stitching: How a direction moves; none takes it as it is, which says something only where both models have one
            basis: a model and its fine-tune.
        latents: Which; none takes all.

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
    _check_widths(crosscoder, stitching)
    if stitching is not None:
        to_b, to_a = stitching.direction_to_b(to_b), stitching.direction_to_a(to_a)
    norms, scale = crosscoder.decoder_norms()[:, chosen, None], crosscoder.input_scale
    unit_b, unit_a = (normalize(x, eps=torch.finfo(x.dtype).tiny) for x in (to_b, to_a))
    return unit_b * (norms[0] / scale[1]).float(), unit_a * (norms[1] / scale[0]).float()


def _check_widths(crosscoder: Crosscoder, stitching: Stitching | None) -> None:
    d_a, d_b = crosscoder.cfg.d_a, crosscoder.cfg.d_b
    if stitching is None and d_a != d_b:
        raise ValueError(
            f"A direction of width {d_a} cannot stand for one of width {d_b}. Give a stitching map."
        )


def decoders_in_b(
    crosscoder: Crosscoder, stitching: Stitching | None = None
) -> tuple[Float[Tensor, "d_sae d_b"], Float[Tensor, "d_sae d_b"]]:
    """Each latent's decoder in A, moved to B, and that in B; B's raw units.

    Args:
        crosscoder: The saved crosscoder.
        stitching: See `moved_decoders`; without one A's decoder is taken as it is, its length too.

    Raises:
        ValueError: Without a map the two widths differ.
    """
    _check_widths(crosscoder, stitching)
    in_a, in_b = (crosscoder.W_dec.float()[:, m] for m in crosscoder.partition.models.values())
    return (in_a if stitching is None else moved_decoders(crosscoder, stitching)[0]), in_b


@torch.no_grad()
def decoder_differences(
    crosscoder: Crosscoder, stitching: Stitching | None = None
) -> Float[Tensor, "d_sae d_b"]:
    """`d_b - d_a`: what B writes for each latent beyond what A does, in B's raw units; see `decoders_in_b`.

    Of a latent of B alone it is its decoder, of one that both models have in one way it is 0. `f (d_b - d_a)`
    is what the latent explains of the difference of the two models' activations.
    """
    return both_decoder_differences(crosscoder, stitching)[1]


@torch.no_grad()
def both_decoder_differences(
    crosscoder: Crosscoder, stitching: Stitching | None = None
) -> tuple[Float[Tensor, "d_sae d_a"], Float[Tensor, "d_sae d_b"]]:
    """Of each latent `d_a` less B's decoder moved to A, and `d_b` less A's moved to B: each model's own part, in its raw units.

    Args:
        crosscoder: The saved crosscoder.
        stitching: How a direction moves; without one the decoders are taken as they are, their length too.

    Raises:
        ValueError: Without a map the two widths differ.
    """
    _check_widths(crosscoder, stitching)
    in_a, in_b = (crosscoder.W_dec.float()[:, m] for m in crosscoder.partition.models.values())
    to_b, to_a = moved_decoders(crosscoder, stitching) if stitching else (in_a, in_b)
    return in_a - to_a, in_b - to_b


@torch.no_grad()
def relative_decoder_differences(
    crosscoder: Crosscoder, stitching: Stitching | None = None
) -> Float[Tensor, " d_sae"]:
    """`|d_b - d_a| / (|d_a| + |d_b|)` of each latent: 1 is one model's alone, or two opposite directions; 0 is the same in both.

    The relative norm (`relative_decoder_norms`) misses a latent that both models write with one length in two
    directions, as a narrow fine-tune makes of one that the model had before.

    Args:
        crosscoder: The saved crosscoder.
        stitching: See `decoders_in_b`.
    """
    in_a, in_b = decoders_in_b(crosscoder, stitching)
    return relative_difference(in_a, in_b)


def relative_difference(
    x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """`|y - x| / (|x| + |y|)`, 0 where both are 0.

    >>> relative_difference(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
    tensor([0.7143, 1.0000])
    """
    total = x.norm(dim=-1) + y.norm(dim=-1)
    return torch.where(total == 0, 0.0, (y - x).norm(dim=-1) / total)


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
        "a_to_b": _cosines(stitching.direction_to_b(in_a), in_b),
        "b_to_a": _cosines(stitching.direction_to_a(in_b), in_a),
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
    """For each model (`a`, `b`) the cosine of what a latent reads of it and what it writes to it; 0 where it does neither.

    The scale that a model had in training changes both lengths and no cosine. Near 1 a latent is read along its own direction;
    a small one reads something else than it writes, or takes much out that other latents write.
    """
    rows = list(latents)
    return {
        m: _cosines(crosscoder.W_enc[inputs, :][:, rows].T, crosscoder.W_dec[rows, inputs])
        for m, inputs in crosscoder.partition.models.items()
    }


def _cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Whatever the units, in which a decoder may be very short; 0 where one of them is."""
    return cosine_similarity(x.double(), y.double(), eps=torch.finfo(torch.double).tiny).float()


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
