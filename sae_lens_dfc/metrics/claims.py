"""Which latents are called exclusive, and on what evidence: an exclusive partition is filled whatever the models are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.exclusivity import ONE_SIDED, quantiles, relative_decoder_norms
from sae_lens_dfc.metrics.scaling import owned_by_a
from sae_lens_dfc.metrics.significance import benjamini_hochberg, empirical_p
from sae_lens_dfc.metrics.span import explained_by_few
from sae_lens_dfc.metrics.spread import Estimate

TWO_SIDED = 0.7
"""Relative decoder norm below which (and above 1 - which) a latent is without doubt in both models."""
MAX_NU_ERROR = 0.2
MAX_NU_RECONSTRUCTION = 0.5
"""Latent scaling below which a latent is its source's alone (arXiv 2504.02922, section 3)."""
MIN_REFERENCE_NU = 0.2
"""Median latent scaling of the latents that both models have, below which a way to move directions tells nothing: it
does not find there what is there."""
MAX_FALSE_DISCOVERIES = 0.05
"""Share of the calls that may be false."""
MIN_FIRINGS = 20
"""Held-out firings below which a latent is not judged."""
N_SPAN_REFERENCE = 512
"""Two-sided latents whose directions are looked for among the others'; more take time and say no more."""
MAX_SPANNED = 4096
"""Candidates of which the same is asked."""


class LatentEvidence(NamedTuple):
    """What was measured of each latent. A *candidate* is in an exclusive partition, or has one-sided decoder norms."""

    is_a: Bool[Tensor, " d_sae"]
    """Whether its source is model A."""
    is_candidate: Bool[Tensor, " d_sae"]
    is_two_sided: Bool[Tensor, " d_sae"]
    """Whether it is one of the latents that candidates are compared with."""
    firings: Int[Tensor, " d_sae"]
    """On how many held-out pairs it fires as a function of its source alone: for an exclusive latent, on how many it fires."""
    relative_decoder_norm: Float[Tensor, " d_sae"]
    nu_error: Float[Tensor, " d_sae"]
    nu_error_se: Float[Tensor, " d_sae"]
    nu_reconstruction: Float[Tensor, " d_sae"]
    nu_reconstruction_se: Float[Tensor, " d_sae"]
    auc: Float[Tensor, " d_sae"]
    """How well the target tells when it fires; 1/2 when not at all."""
    r2: Float[Tensor, " d_sae"]
    span: Float[Tensor, " d_sae"]
    """Share of its direction, moved to the target, that five of the target's shared latents explain; NaN where not asked."""
    p_scaling: Float[Tensor, " d_sae"]
    p_transfer: Float[Tensor, " d_sae"]
    q: Float[Tensor, " d_sae"]
    """False discovery rate at which it would just be called exclusive; NaN where it is not judged."""
    is_exclusive: Bool[Tensor, " d_sae"]
    """Whether it is called exclusive, with evidence."""

    @property
    def groups(self) -> dict[str, Bool[Tensor, " d_sae"]]:
        """The candidates of each model, and the latents that both models have, as far as they fire often enough."""
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
    """The evidence of each latent, and which are called exclusive.

    A candidate that fires often enough is called when both hold, at a false discovery rate of 5 % over all
    candidates of the run (Benjamini & Hochberg on the larger of the two p-values):

    - `nu_error` is within 0.2 of 0 and `nu_reconstruction` within 0.5, beyond their standard error: the target has its
      direction neither in its error nor in its reconstruction, whichever way it is moved there. These are Minder et
      al.'s limits for models of one basis; a map that is not exact lowers both measures for every latent, so the limits are
      times the median of the latents that both models have, where that is below 1. A way to move directions by which even
      those are not found (a median below 0.2) is left out, and without any other nothing is called.
    - the target tells its firing worse than that of nearly all latents that both models have: the p-value is
      the share of those, in the same crosscoder, whose ROC-AUC is as near to 1/2.

    Args:
        crosscoder: The saved crosscoder.
        directions: Each latent's direction in both models; see `scaling.directions`.
        scaling: `LatentScaling.estimates()`, of each way to move directions.
        transfer: `Transfer.compute()`.
    """
    relative = relative_decoder_norms(crosscoder)
    is_candidate = candidates(crosscoder)
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
    # A latent whose firing is told the wrong way round is told.
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
    """The largest p-value over the ways to move directions that can tell anything; 1 where none can."""
    limits = {"nu_error": MAX_NU_ERROR, "nu_reconstruction": MAX_NU_RECONSTRUCTION}
    p = torch.zeros_like(scaling[next(iter(scaling))]["nu_error"].value)
    can_tell = False
    for way in scaling.values():
        medians = {name: _median(way[name].value[reference]) for name in limits}
        if min(medians.values()) < MIN_REFERENCE_NU:
            continue
        can_tell = True
        for name, limit in limits.items():
            p = torch.maximum(p, p_near_zero(way[name], limit * min(medians[name], 1.0)))
    return p if can_tell else torch.ones_like(p)


def _median(values: Float[Tensor, " n"]) -> float:
    """0 where nothing is known."""
    known = values[~values.isnan()]
    return known.median().item() if len(known) > 0 else 0.0


def _largest(ways: Sequence[Estimate]) -> Estimate:
    """Of several estimates of each latent the one furthest from 0, to be shown."""
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
    """The measures of each latent, turned so that larger is more exclusive."""
    return {
        "latent_scaling/nu_error": -evidence.nu_error.abs(),
        "latent_scaling/nu_reconstruction": -evidence.nu_reconstruction.abs(),
        "transfer/auc": -(evidence.auc - 0.5).abs(),
        "transfer/r2": -evidence.r2,
        "transfer/span": -evidence.span,
    }


def verdict(evidence: LatentEvidence, latent: int) -> str:
    """Whether a latent is called exclusive, and why or why not, in words."""
    if not evidence.is_candidate[latent]:
        return "not a candidate: its decoder norms are not one-sided"
    firings = int(evidence.firings[latent])
    if firings < MIN_FIRINGS:
        return f"not judged: it fired {firings} times, and {MIN_FIRINGS} are needed"
    source, target = ("A", "B") if evidence.is_a[latent] else ("B", "A")
    error, reconstruction = evidence.nu_error[latent], evidence.nu_reconstruction[latent]
    measures = (
        f"latent scaling in {target} {error:.2f} (error) and {reconstruction:.2f} (reconstruction), p = "
        f"{evidence.p_scaling[latent]:.2g}; {target} tells its firing with AUC {evidence.auc[latent]:.3f}, p = "
        f"{evidence.p_transfer[latent]:.2g}; q = {evidence.q[latent]:.2g}"
    )
    called = (
        f"exclusive to {source}, with evidence"
        if evidence.is_exclusive[latent]
        else "not shown to be exclusive"
    )
    return f"{called}: {measures}"


def ranking(evidence: LatentEvidence) -> Int[Tensor, " n"]:
    """Latents that fire often enough, those with the most evidence of being exclusive first.

    Candidates by their p-value, and where it is the same by how ill the target tells their firing; then the others by how
    one-sided their decoder norms are.
    """
    p = torch.maximum(evidence.p_scaling, evidence.p_transfer)
    one_sided = (2 * evidence.relative_decoder_norm - 1).abs()
    first = torch.where(evidence.is_candidate, p, 2 - one_sided)
    second = torch.where(evidence.is_candidate, evidence.auc.nan_to_num(1.0), 0)
    order = torch.from_numpy(np.lexsort((second.cpu().numpy(), first.cpu().numpy())))
    return order[(evidence.firings >= MIN_FIRINGS).cpu()[order]]


def claim_metrics(evidence: LatentEvidence) -> dict[str, float]:
    """Each measure's median and quantiles over the candidates of each model and the two-sided latents, and the calls.

    `latent_scaling/nu_error/GROUP` and so on; `exclusive/judged/GROUP`, how many candidates fire often enough;
    `exclusive/scaling/GROUP` and `exclusive/transfer/GROUP`, how many pass either test alone, at p <= 0.05 each;
    `exclusive/called/GROUP`, how many are called exclusive; `exclusive/called_share`, their share of all latents;
    `exclusive/reference`, how many two-sided latents they were compared with: of few, none can be called.
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
        result[f"exclusive/called/{group}"] = int(evidence.is_exclusive[judged].sum())
    result["exclusive/reference"] = int(evidence.groups[SHARED].sum())
    result["exclusive/called_share"] = evidence.is_exclusive.double().mean().item()
    return result


@torch.no_grad()
def candidates(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Latents of the exclusive partitions, and those whose decoder has all but left one model."""
    relative = relative_decoder_norms(crosscoder)
    is_candidate = (relative > ONE_SIDED) | (relative < 1 - ONE_SIDED)
    is_candidate[: crosscoder.partition.slices[SHARED].start] = True
    return is_candidate


def p_near_zero(estimate: Estimate, limit: float) -> Float[Tensor, "*shape"]:
    """The p-value of a measure's lying outside `[-limit, limit]` (two one-sided t tests); 1 where its error is not known.

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
    """Of candidates, and of some two-sided latents, each of which may use all but itself."""
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
