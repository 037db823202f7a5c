"""Decides which latents are exclusive with evidence, by latent scaling and the transfer test with
FDR control."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student
from torch import Tensor

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import ONE_SIDED, quantiles, relative_decoder_norms
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.stats.jackknife import Estimate
from sae_lens_dfc.stats.matching_pursuit import explained_by_few
from sae_lens_dfc.stats.significance import benjamini_hochberg, empirical_p

TWO_SIDED = 0.7
"""Relative decoder norm up to which (and down to 1 minus which) a latent is clearly in both
models."""
MAX_NU_ERROR = 0.2
MAX_NU_RECONSTRUCTION = 0.5
"""Latent scaling limits below which a latent is exclusive to its source (arXiv 2504.02922, section
3)."""
MIN_REFERENCE_NU = 0.2
"""Minimum median latent scaling of two-sided latents: a mapping of directions with less fails to
detect features that are present, and is not used."""
MAX_FALSE_DISCOVERIES = 0.05
"""False discovery rate of the verdicts."""
MIN_FIRINGS = 20
"""Minimum held-out firings to judge a latent."""
N_SPAN_REFERENCE = 512
"""Number of two-sided latents for which `span` is computed; more take time and add nothing."""
MAX_SPANNED = 4096
"""Maximum number of candidates per run for which `span` is computed."""


class LatentEvidence(NamedTuple):
    """Exclusivity evidence for each latent. A *candidate* is in an exclusive partition or has
    one-sided decoder norms. Its *source* is the model in which its decoder is stronger, its
    *target* the other."""

    is_a: Bool[Tensor, " d_sae"]
    """Whether its source is model A."""
    is_candidate: Bool[Tensor, " d_sae"]
    is_two_sided: Bool[Tensor, " d_sae"]
    """Whether it is a reference latent that both models have, with which candidates are
    compared."""
    firings: Int[Tensor, " d_sae"]
    """Number of held-out pairs on which it fires when computed from its source alone; for an
    exclusive latent, the number on which it fires."""
    relative_decoder_norm: Float[Tensor, " d_sae"]
    nu_error: Float[Tensor, " d_sae"]
    nu_error_se: Float[Tensor, " d_sae"]
    nu_reconstruction: Float[Tensor, " d_sae"]
    nu_reconstruction_se: Float[Tensor, " d_sae"]
    auc: Float[Tensor, " d_sae"]
    """AUROC with which the target's activations predict its firing; 1/2 is chance."""
    r2: Float[Tensor, " d_sae"]
    span: Float[Tensor, " d_sae"]
    """Share of its direction, mapped to the target, that five of the target's shared latents
    explain; NaN if not computed."""
    p_scaling: Float[Tensor, " d_sae"]
    p_transfer: Float[Tensor, " d_sae"]
    q: Float[Tensor, " d_sae"]
    """Smallest false discovery rate at which it would be significant; NaN if not judged."""
    is_exclusive: Bool[Tensor, " d_sae"]
    """Whether it is exclusive, with evidence."""

    @property
    def groups(self) -> dict[str, Bool[Tensor, " d_sae"]]:
        """Masks of each model's candidates and of the two-sided latents, restricted to those that
        fire often enough."""
        fires = self.firings >= MIN_FIRINGS
        return {
            A_EXCLUSIVE: self.is_candidate & self.is_a & fires,
            B_EXCLUSIVE: self.is_candidate & ~self.is_a & fires,
            SHARED: self.is_two_sided & fires,
        }


def latent_evidence(
    crosscoder: Crosscoder,
    directions: Float[Tensor, "d_sae d_in"],
    scaling: Mapping[str, Mapping[str, Estimate]],
    transfer: dict[str, Float[Tensor, " d_sae"]],
) -> LatentEvidence:
    """Collect the evidence for each latent and decide which are exclusive.

    A candidate that fires often enough is exclusive, with evidence, if both conditions hold, at a
    false discovery rate of 5 % over all candidates of the run (Benjamini & Hochberg on the larger
    of the two p-values):

    - `nu_error` is within 0.2 of 0 and `nu_reconstruction` within 0.5, beyond their standard error:
      the target has the direction neither in its error nor in its reconstruction, under every
      mapping of directions. These are Minder et al.'s limits for models that share a basis. An
      inexact map lowers both values for every latent, so the limits are multiplied by the median
      over two-sided latents if that is below 1. A mapping that fails to detect even two-sided
      latents (median below 0.2) is left out; if none remains, no latent is significant.
    - the target predicts its firing worse than that of nearly all two-sided latents: the p-value is
      the share of those, in the same crosscoder, whose AUROC is as close to 1/2.

    Args:
        crosscoder: The saved crosscoder.
        directions: Each latent's direction in both models; see `latent_scaling.directions`.
        scaling: `LatentScaling.estimates()`, for each mapping of directions.
        transfer: `Transfer.compute()`.
    """
    relative = relative_decoder_norms(crosscoder)
    is_candidate = candidate_latents(crosscoder)
    is_two_sided = ~is_candidate & (relative <= TWO_SIDED) & (relative >= 1 - TWO_SIDED)
    firings = transfer["firings"].long()
    judged = is_candidate & (firings >= MIN_FIRINGS)
    reference = is_two_sided & (firings >= MIN_FIRINGS)
    error, reconstruction = (
        _largest([way[name] for way in scaling.values()])
        for name in ("nu_error", "nu_reconstruction")
    )
    p_scaling = _p_scaling(scaling, reference)
    auc = transfer["auc"]
    # An AUROC well below 0.5 is predictive too.
    ignorance = -(auc - 0.5).abs()
    p_transfer = empirical_p(ignorance, ignorance[reference])
    q = torch.full_like(p_scaling, torch.nan)
    q[judged] = benjamini_hochberg(torch.maximum(p_scaling, p_transfer)[judged])
    return LatentEvidence(
        is_a=owned_by_a(crosscoder),
        is_candidate=is_candidate,
        is_two_sided=is_two_sided,
        firings=firings,
        relative_decoder_norm=relative,
        nu_error=error.value.float(),
        nu_error_se=error.se.float(),
        nu_reconstruction=reconstruction.value.float(),
        nu_reconstruction_se=reconstruction.se.float(),
        auc=auc,
        r2=transfer["r2"],
        span=_span(crosscoder, directions, judged, reference),
        p_scaling=p_scaling.float(),
        p_transfer=p_transfer.float(),
        q=q.float(),
        is_exclusive=q <= MAX_FALSE_DISCOVERIES,
    )


def _p_scaling(
    scaling: Mapping[str, Mapping[str, Estimate]], reference: Bool[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """The largest p-value over the mappings that detect two-sided latents; 1 if none does."""
    limits = {"nu_error": MAX_NU_ERROR, "nu_reconstruction": MAX_NU_RECONSTRUCTION}
    p = torch.zeros_like(scaling[next(iter(scaling))]["nu_error"].value)
    has_power = False
    for way in scaling.values():
        medians = {name: _median(way[name].value[reference]) for name in limits}
        if min(medians.values()) < MIN_REFERENCE_NU:
            continue
        has_power = True
        for name, limit in limits.items():
            p = torch.maximum(p, p_near_zero(way[name], limit * min(medians[name], 1.0)))
    return p if has_power else torch.ones_like(p)


def _median(values: Float[Tensor, " n"]) -> float:
    """Median without NaN; 0 if all are NaN."""
    known = values[~values.isnan()]
    return known.median().item() if len(known) > 0 else 0.0


def _largest(ways: Sequence[Estimate]) -> Estimate:
    """For each latent, the estimate furthest from 0, for display."""
    largest = ways[0]
    for other in ways[1:]:
        further = other.value.abs() > largest.value.abs()
        value, se = (
            torch.where(further, x, y)
            for x, y in ((other.value, largest.value), (other.se, largest.se))
        )
        largest = Estimate(value, se, min(other.degrees, largest.degrees))
    return largest


def oriented(evidence: LatentEvidence) -> dict[str, Float[Tensor, " d_sae"]]:
    """Metrics of each latent, signed so that larger is more exclusive."""
    return {
        "latent_scaling/nu_error": -evidence.nu_error.abs(),
        "latent_scaling/nu_reconstruction": -evidence.nu_reconstruction.abs(),
        "transfer/auc": -(evidence.auc - 0.5).abs(),
        "transfer/r2": -evidence.r2,
        "transfer/span": -evidence.span,
    }


def verdict(evidence: LatentEvidence, latent: int) -> str:
    """Describe in words whether a latent is exclusive with evidence, and why."""
    if not evidence.is_candidate[latent]:
        return "not a candidate: its decoder norms are not one-sided"
    firings = int(evidence.firings[latent])
    if firings < MIN_FIRINGS:
        return f"not judged: it fired {firings} times, and {MIN_FIRINGS} are needed"
    source, target = ("A", "B") if evidence.is_a[latent] else ("B", "A")
    error, reconstruction = evidence.nu_error[latent], evidence.nu_reconstruction[latent]
    measures = (
        f"latent scaling in {target} {error:.2f} (error) and {reconstruction:.2f} (reconstruction), p = "
        f"{evidence.p_scaling[latent]:.2g}; {target} predicts its firing with AUROC {evidence.auc[latent]:.3f}, p = "
        f"{evidence.p_transfer[latent]:.2g}; q = {evidence.q[latent]:.2g}"
    )
    called = (
        f"exclusive to {source}, with evidence"
        if evidence.is_exclusive[latent]
        else "not shown to be exclusive"
    )
    return f"{called}: {measures}"


def ranking(evidence: LatentEvidence) -> Int[Tensor, " n"]:
    """Latents that fire often enough, ranked by evidence of exclusivity, strongest first.

    Candidates are sorted by p-value, ties by how poorly the target predicts their firing; then the
    others by how one-sided their decoder norms are.
    """
    p = torch.maximum(evidence.p_scaling, evidence.p_transfer)
    one_sided = (2 * evidence.relative_decoder_norm - 1).abs()
    first = torch.where(evidence.is_candidate, p, 2 - one_sided)
    second = torch.where(evidence.is_candidate, evidence.auc.nan_to_num(1.0), 0)
    order = torch.from_numpy(np.lexsort((second.cpu().numpy(), first.cpu().numpy())))
    return order[(evidence.firings >= MIN_FIRINGS).cpu()[order]]


def claim_metrics(evidence: LatentEvidence) -> dict[str, float]:
    """Median and quantiles of each metric over each model's candidates and the two-sided latents,
    and counts of calls.

    Keys are `latent_scaling/nu_error/GROUP` and so on; `exclusive/judged/GROUP`, how many
    candidates fire often enough; `exclusive/scaling/GROUP` and `exclusive/transfer/GROUP`, how many
    pass each test alone at p <= 0.05; `exclusive/significant/GROUP`, how many are exclusive with evidence;
    `exclusive/significant_share`, their share of all latents; and `exclusive/reference`, the number of
    two-sided latents used for comparison: with few, no latent can be called.
    """
    values = {
        "latent_scaling/nu_error": evidence.nu_error,
        "latent_scaling/nu_reconstruction": evidence.nu_reconstruction,
        "transfer/auc": evidence.auc,
        "transfer/r2": evidence.r2,
        "transfer/span": evidence.span,
    }
    result: dict[str, float] = {}
    for group, latents in evidence.groups.items():
        for name, value in values.items():
            result |= quantiles(f"{name}/{group}", value[latents])
    for group in (A_EXCLUSIVE, B_EXCLUSIVE):
        judged = evidence.groups[group]
        result[f"exclusive/judged/{group}"] = int(judged.sum())
        for name, p in (("scaling", evidence.p_scaling), ("transfer", evidence.p_transfer)):
            result[f"exclusive/{name}/{group}"] = int((p[judged] <= 0.05).sum())
        result[f"exclusive/significant/{group}"] = int(evidence.is_exclusive[judged].sum())
    result["exclusive/reference"] = int(evidence.groups[SHARED].sum())
    result["exclusive/significant_share"] = evidence.is_exclusive.double().mean().item()
    return result


@torch.no_grad()
def candidate_latents(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Latents of the exclusive partitions, and those whose decoder has all but vanished in one
    model."""
    relative = relative_decoder_norms(crosscoder)
    is_candidate = (relative > ONE_SIDED) | (relative < 1 - ONE_SIDED)
    is_candidate[: crosscoder.partition.slices[SHARED].start] = True
    return is_candidate


def p_near_zero(estimate: Estimate, limit: float) -> Float[Tensor, "*shape"]:
    """The p-value of the hypothesis that an estimate lies outside `[-limit, limit]` (two one-sided
    t tests); 1 if its standard error is unknown.

    >>> one = torch.ones(1, dtype=torch.double)
    >>> p_near_zero(Estimate(0 * one, 0.1 * one, 9), 0.2).item() < 0.05 < p_near_zero(Estimate(0.1 * one, one, 9), 0.2).item()
    True
    """
    if estimate.degrees < 1:
        return torch.ones_like(estimate.value)
    distance = (limit - estimate.value.abs()) / estimate.se
    p = torch.from_numpy(student.sf(distance.cpu().numpy(), estimate.degrees))
    return p.to(estimate.value).nan_to_num(1.0)


def _span(
    crosscoder: Crosscoder, directions: Tensor, judged: Tensor, reference: Tensor
) -> Float[Tensor, " d_sae"]:
    """`span` of candidates and of some two-sided latents, each explained by shared latents other
    than itself."""
    span = torch.full_like(directions[:, 0], torch.nan)
    shared = crosscoder.partition.slices[SHARED]
    some = reference.nonzero()[:N_SPAN_REFERENCE, 0]
    asked = torch.zeros_like(judged)
    asked[some] = True
    asked[judged.nonzero()[:MAX_SPANNED, 0]] = True
    for latents, target in _by_target(crosscoder, asked):
        dictionary = crosscoder.W_dec[shared, target].float()
        own = latents - shared.start
        span[latents] = explained_by_few(directions[latents, target], dictionary, own)
    return span


def _by_target(crosscoder: Crosscoder, asked: Tensor) -> Iterator[tuple[Tensor, slice]]:
    is_a, models = owned_by_a(crosscoder), crosscoder.partition.models
    yield (asked & is_a).nonzero()[:, 0], models["b"]
    yield (asked & ~is_a).nonzero()[:, 0], models["a"]
