"""Turns the ablation of a shared latent in both models into a verdict: what it costs them is compared
over texts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.ablated_in_both import LossRises
from sae_lens_dfc.analysis.options import MIN_TEXTS
from sae_lens_dfc.analysis.report.findings import EffectView, Finding
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MAX_FALSE_DISCOVERIES,
    LatentEvidence,
    p_target_worse,
)
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.significance import (
    benjamini_hochberg,
    interval,
    p_positive,
    rank_correlation,
)

DIFFERENT, ALIKE, SHARED_BY_BOTH = "used differently", "used alike", "shared"
SHARED_EFFECTS = ("its model's loss rises by, nats", "the other's rises by, nats")
"""Short names of a shared latent's two effects."""


@dataclass(frozen=True)
class SharedTest:
    """Result of ablating a shared latent in both models."""

    source: ModelName
    """The model in which its decoder is stronger."""
    n_texts: int
    source_rise: EffectView
    target_rise: EffectView
    p_more: float
    """The larger p-value of the hypotheses that the source does not lose by the ablation, and that
    it loses no more than the target."""
    correlation: float
    """Spearman's correlation of the two rises over texts."""
    p_alike: float
    """The p-value of the hypothesis that they do not correlate positively."""


def compared(found: LossRises, source: ModelName) -> SharedTest | None:
    """Compare the two models' rises; none on too few texts."""
    own, other = (found.a, found.b) if source == "a" else (found.b, found.a)
    if len(own) < MIN_TEXTS:
        return None
    correlation, p_alike = rank_correlation(own, other)
    return SharedTest(
        source=source,
        n_texts=len(own),
        source_rise=_view(source, own),
        target_rise=_view(OTHER[source], other),
        p_more=max(p_positive(own), p_positive(own - other)),
        correlation=correlation,
        p_alike=p_alike,
    )


def _view(m: ModelName, rises: Float[Tensor, " texts"]) -> EffectView:
    name = f"ablated in {m.upper()}: {m.upper()}'s loss rises by, nats"
    return EffectView(name, rises.mean().item(), *interval(rises), {})


class _Adjusted(NamedTuple):
    """Adjusted p-values of one latent."""

    different: float
    alike: float


def shared_findings(
    results: Mapping[int, SharedTest | None], partition: Iterable[str], evidence: LatentEvidence
) -> list[Finding]:
    """A verdict on each shared latent that was tested.

    It is

    - `used differently` if the source loses by the ablation, and more than the target does, and
      after most of the latent's firings the target predicts worse;
    - else `used alike` if the two rises of the loss correlate positively over texts (Spearman);
    - else `shared`.

    Each at a false discovery rate of 5 % over all tested latents (Benjamini-Hochberg on the largest
    p-value of the conditions). Two models of the same text differ in how much they lose by a latent
    as well; that the target predicts worse where it fires separates these from what one model alone
    can use.

    Args:
        results: Result of each test; none if the latent fired in too few texts.
        partition: Name of each tested latent's partition, in order.
        evidence: Evidence of exclusivity.
    """
    done = {i: one for i, one in results.items() if one is not None}
    worse = p_target_worse(evidence)
    p = torch.tensor([max(one.p_more, worse[i].item()) for i, one in done.items()])
    p_alike = torch.tensor([one.p_alike for one in done.values()])
    both = (benjamini_hochberg(values).tolist() for values in (p, p_alike))
    q = {i: _Adjusted(*own) for i, own in zip(done, zip(*both, strict=True), strict=True)}
    return [
        _finding(latent, name, done.get(latent), q.get(latent), evidence)
        for latent, name in zip(results, partition, strict=True)
    ]


def _finding(
    latent: int,
    partition: str,
    one: SharedTest | None,
    q: _Adjusted | None,
    evidence: LatentEvidence,
) -> Finding:
    verdict = SHARED_BY_BOTH
    if q is not None and q.different <= MAX_FALSE_DISCOVERIES:
        verdict = DIFFERENT
    elif q is not None and q.alike <= MAX_FALSE_DISCOVERIES:
        verdict = ALIKE
    return Finding(
        latent=latent,
        partition=partition,
        rank=0,
        description=None,
        detection=None,
        concerns=[],
        effects=[] if one is None else [one.source_rise, one.target_rise],
        samples=[],
        verdict=verdict,
        reasons=[TOO_FEW] if one is None or q is None else _reasons(latent, one, q, evidence),
    )


TOO_FEW = f"It fires in fewer than {MIN_TEXTS} held-out texts."


def _reasons(latent: int, one: SharedTest, q: _Adjusted, evidence: LatentEvidence) -> list[str]:
    source, target = one.source.upper(), OTHER[one.source].upper()
    own, other, worse = one.source_rise, one.target_rise, evidence.target_worse[latent].item()
    return [
        f"Ablating it in {source} raises {source}'s loss on the text that follows by {own.mean:.3f} nats, and ablating it in {target} "
        f"raises {target}'s by {other.mean:.3f}; after {worse:.0%} of its firings {target} predicts worse (q = {q.different:.2g}).",
        f"On {one.n_texts} texts the two rises have a rank correlation of {one.correlation:.2f} (q = {q.alike:.2g}).",
    ]
