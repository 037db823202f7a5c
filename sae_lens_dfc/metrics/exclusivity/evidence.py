"""Decides which latents are exclusive with evidence, by how much the other model knows of them, with
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
from sae_lens_dfc.metrics.exclusivity.decoders import (
    candidate_latents,
    quantiles,
    relative_decoder_norms,
    two_sided_latents,
)
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.metrics.exclusivity.target_worse import NAMES
from sae_lens_dfc.stats.jackknife import N_BLOCKS, Estimate
from sae_lens_dfc.stats.matching_pursuit import explained_by_few
from sae_lens_dfc.stats.significance import benjamini_hochberg

MAX_KNOWN = 0.5
"""Share known below which a latent is exclusive to its source."""
MIN_WORSE = 0.5
"""Share of its firings above which the target lacks what follows a latent."""
CLEARLY_KNOWN, CLEARLY_WORSE = 0.25, 0.75
"""Share known, and share of firings, of a clear difference, whose power is reported."""
MIN_OWN_R2 = 0.4
"""Minimum share of a latent's variance that its source's activations explain: of a latent that they
do not explain either, the target's ignorance says nothing."""
MAX_FALSE_DISCOVERIES = 0.05
"""False discovery rate of the verdicts."""
MIN_FIRINGS = 20
"""Minimum held-out firings to judge a latent."""
N_SPAN_REFERENCE = 512
"""Number of two-sided latents for which `span` is computed; more take time and add nothing."""
MAX_SPANNED = 4096
"""Maximum number of candidates per run for which `span` is computed."""


METRICS = {
    "known": "known",
    "target_worse": "target_worse",
    "nu_error": "latent_scaling/nu_error",
    "nu_reconstruction": "latent_scaling/nu_reconstruction",
    "auc": "transfer/auc",
    "r2": "transfer/r2",
    "span": "transfer/span",
}
"""The measures of `LatentEvidence` that are summarized over latents, with the metric of each."""


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
    known: Float[Tensor, " d_sae"]
    """Share of it that its target knows; see `ShareKnown`. NaN if not measured."""
    known_se: Float[Tensor, " d_sae"]
    own_r2: Float[Tensor, " d_sae"]
    """Share of its variance within contexts that its source's activations explain."""
    target_worse: Float[Tensor, " d_sae"]
    """Share of its firings after which its target predicts worse than its source; see
    `TargetWorse`. NaN if not measured."""
    target_worse_se: Float[Tensor, " d_sae"]
    next_worse: Float[Tensor, " d_sae"]
    """The same share, on the text up to the next pair alone."""
    next_worse_se: Float[Tensor, " d_sae"]
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
    p: Float[Tensor, " d_sae"]
    """Larger p-value of the hypotheses that its target knows half of it or more, and that its
    target predicts worse after at most half of its firings; NaN if not judged."""
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

    @property
    def is_judged(self) -> Bool[Tensor, " d_sae"]:
        """Candidates with a p-value."""
        return ~self.q.isnan()


def latent_evidence(
    crosscoder: Crosscoder,
    directions: Float[Tensor, "d_sae d_in"],
    known: Mapping[str, Estimate],
    scaling: Mapping[str, Mapping[str, Estimate]],
    transfer: dict[str, Float[Tensor, " d_sae"]],
    worse: Mapping[str, Estimate] | None = None,
) -> LatentEvidence:
    """Collect the evidence for each latent and decide which are exclusive.

    A candidate is exclusive, with evidence, if

    - its target knows less than half of it, and
    - after most of its firings, the target's loss on the text that follows is more than 1.25 times
      the source's (if losses are given: toy pairs have no text),

    both beyond the standard error (one-sided t-tests), at a false discovery rate of 5 % over all
    judged candidates of the run (Benjamini & Hochberg on the larger p-value). A candidate is judged
    if it fires often enough, and if its source's activations explain enough of it.

    Two models trained on the same text have many latents of which the other knows little, because
    they represent the same text in different ways. The second condition separates these from what
    the other model lacks.

    The other measures do not enter: latent scaling and the transfer test move a direction by an
    affine map, and between models that differ most the map finds nothing of latents that both have.

    Args:
        crosscoder: The saved crosscoder.
        directions: Each latent's direction in both models; see `latent_scaling.directions`.
        known: `ShareKnown.estimates()`.
        scaling: `LatentScaling.estimates()`, for each mapping of directions.
        transfer: `Transfer.compute()`.
        worse: `TargetWorse.estimates()`.
    """
    is_candidate, is_two_sided = candidate_latents(crosscoder), two_sided_latents(crosscoder)
    firings = transfer["firings"].long()
    fires = firings >= MIN_FIRINGS
    error, reconstruction = (
        _largest([way[name] for way in scaling.values()])
        for name in ("nu_error", "nu_reconstruction")
    )
    p = p_below(known["known"], MAX_KNOWN)
    if worse is None:
        unknown = Estimate(torch.full_like(p, torch.nan), torch.full_like(p, torch.nan), 0)
        worse = dict.fromkeys(NAMES, unknown)
    else:
        p = torch.maximum(p, p_above(worse["target_worse"], MIN_WORSE))
    judged = is_candidate & fires & (known["own_r2"].value >= MIN_OWN_R2)
    p[~judged] = torch.nan
    q = torch.full_like(p, torch.nan)
    q[judged] = benjamini_hochberg(p[judged])
    return LatentEvidence(
        is_a=owned_by_a(crosscoder),
        is_candidate=is_candidate,
        is_two_sided=is_two_sided,
        firings=firings,
        relative_decoder_norm=relative_decoder_norms(crosscoder),
        known=known["known"].value.float(),
        known_se=known["known"].se.float(),
        own_r2=known["own_r2"].value.float(),
        target_worse=worse["target_worse"].value.float(),
        target_worse_se=worse["target_worse"].se.float(),
        next_worse=worse["next_worse"].value.float(),
        next_worse_se=worse["next_worse"].se.float(),
        nu_error=error.value.float(),
        nu_error_se=error.se.float(),
        nu_reconstruction=reconstruction.value.float(),
        nu_reconstruction_se=reconstruction.se.float(),
        auc=transfer["auc"],
        r2=transfer["r2"],
        span=_span(crosscoder, directions, is_candidate & fires, is_two_sided & fires),
        p=p.float(),
        q=q.float(),
        is_exclusive=q <= MAX_FALSE_DISCOVERIES,
    )


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
        "known": -evidence.known,
        "target_worse": evidence.target_worse,
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
    if evidence.own_r2[latent].isnan():
        return "not judged: it fired too rarely on training pairs"
    if not evidence.is_judged[latent]:
        return f"not judged: {source}'s own activations explain {evidence.own_r2[latent]:.2f} of it, and {MIN_OWN_R2} are needed"
    error = evidence.known_se[latent]
    worse = evidence.target_worse[latent]
    after = (
        ""
        if worse.isnan()
        else f"after {worse:.2f} ± {evidence.target_worse_se[latent]:.2f} of its firings {target} predicts worse; "
    )
    measures = (
        f"{target} knows {evidence.known[latent]:.2f} ± {error:.2f} of it; {after}"
        f"p = {evidence.p[latent]:.2g}, q = {evidence.q[latent]:.2g}"
    )
    called = (
        f"exclusive to {source}, with evidence"
        if evidence.is_exclusive[latent]
        else "not shown to be exclusive"
    )
    return f"{called}: {measures}"


def ranking(evidence: LatentEvidence) -> Int[Tensor, " n"]:
    """Latents that fire often enough, ranked by evidence of exclusivity, strongest first.

    Candidates are sorted by p-value, ties and those not judged by how poorly the target predicts
    their firing; then the others by how one-sided their decoder norms are.
    """
    one_sided = (2 * evidence.relative_decoder_norm - 1).abs()
    first = torch.where(evidence.is_candidate, evidence.p.nan_to_num(1.0), 2 - one_sided)
    second = torch.where(evidence.is_candidate, evidence.auc.nan_to_num(1.0), 0)
    order = torch.from_numpy(np.lexsort((second.cpu().numpy(), first.cpu().numpy())))
    return order[(evidence.firings >= MIN_FIRINGS).cpu()[order]]


def claim_metrics(evidence: LatentEvidence) -> dict[str, float]:
    """Median and quantiles of each metric over each model's candidates and the two-sided latents,
    counts of calls, and their power.

    Keys are `known/GROUP`, `target_worse/GROUP`, `latent_scaling/nu_error/GROUP` and so on;
    `exclusive/judged/GROUP`, how many candidates can be judged; `exclusive/significant/GROUP`, how
    many are exclusive with evidence; `exclusive/significant_share`, their share of all latents; and
    `exclusive/power/GROUP`, the mean of `power` over the judged candidates.
    """
    result: dict[str, float] = {}
    for group, latents in evidence.groups.items():
        for name, metric in METRICS.items():
            result |= quantiles(f"{metric}/{group}", getattr(evidence, name)[latents])
    for group in (A_EXCLUSIVE, B_EXCLUSIVE):
        judged = evidence.groups[group] & evidence.is_judged
        result[f"exclusive/judged/{group}"] = int(judged.sum())
        result[f"exclusive/significant/{group}"] = int(evidence.is_exclusive[judged].sum())
        if judged.any():
            result[f"exclusive/power/{group}"] = power(evidence)[judged].mean().item()
    result["exclusive/significant_share"] = evidence.is_exclusive.double().mean().item()
    return result


def power(evidence: LatentEvidence) -> Float[Tensor, " d_sae"]:
    """Probability that each judged latent would be called if its target knew a quarter of it and
    predicted worse after three quarters of its firings, with the standard errors that it has; NaN
    for the others.

    The p-value to reach is that of the least significant call of the run, or, without calls, the
    one that the first call needs (Benjamini & Hochberg: 5 % divided by the number of tests).
    """
    called = evidence.p[evidence.is_exclusive]
    first = MAX_FALSE_DISCOVERIES / max(1, int(evidence.is_judged.sum()))
    to_reach = max(called.max().item(), first) if len(called) > 0 else first

    def chance(distance: float, se: Tensor) -> Tensor:
        # Divided in torch, where a standard error of 0 gives infinity without a warning.
        t = (distance / se.double()).cpu().numpy() - student.isf(to_reach, N_BLOCKS - 1)
        return torch.from_numpy(student.cdf(t, N_BLOCKS - 1)).to(evidence.known)

    found = chance(MAX_KNOWN - CLEARLY_KNOWN, evidence.known_se)
    if not evidence.target_worse.isnan().all():
        found *= chance(CLEARLY_WORSE - MIN_WORSE, evidence.target_worse_se).nan_to_num(0.0)
    return found.where(evidence.is_judged, torch.nan)


def p_below(estimate: Estimate, limit: float) -> Float[Tensor, "*shape"]:
    """The p-value of the hypothesis that a quantity is `limit` or more (one-sided t-test); 1 if its
    estimate or standard error is unknown.

    >>> one = torch.ones(1, dtype=torch.double)
    >>> p_below(Estimate(0.3 * one, 0.1 * one, 9), 0.5).item() < 0.05 < p_below(Estimate(0.4 * one, 0.1 * one, 9), 0.5).item()
    True
    """
    if estimate.degrees < 1:
        return torch.ones_like(estimate.value)
    distance = (limit - estimate.value) / estimate.se
    p = torch.from_numpy(student.sf(distance.cpu().numpy(), estimate.degrees))
    return p.to(estimate.value).nan_to_num(1.0)


def p_above(estimate: Estimate, limit: float) -> Float[Tensor, "*shape"]:
    """The p-value of the hypothesis that a quantity is `limit` or less; see `p_below`."""
    return p_below(estimate._replace(value=-estimate.value), -limit)


def p_worse(share: Float[Tensor, " d_sae"], se: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """The p-value of the hypothesis that the target predicts worse after at most half of a latent's
    firings, of a share of `LatentEvidence` and its standard error."""
    return p_above(Estimate(share, se, N_BLOCKS - 1), MIN_WORSE)


def q_target_worse(evidence: LatentEvidence) -> Float[Tensor, " d_sae"]:
    """Smallest false discovery rate, over all latents that fire often enough, at which the target
    predicts worse after most of a latent's firings; 1 for the others, and where the standard error
    is unknown."""
    p = p_worse(evidence.target_worse, evidence.target_worse_se)
    fires = evidence.firings >= MIN_FIRINGS
    q = torch.ones_like(p)
    q[fires] = benjamini_hochberg(p[fires]).to(q)
    return q


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
