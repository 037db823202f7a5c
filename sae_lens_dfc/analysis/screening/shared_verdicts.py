"""Turns the ablation of a shared latent in both models into a verdict: what it costs them is compared
over texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae_lens_dfc.analysis.causal.ablated_in_both import LossRises
from sae_lens_dfc.analysis.report.findings import EffectView, Finding
from sae_lens_dfc.crosscoders.groups import SHARED
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MAX_FALSE_DISCOVERIES,
    LatentEvidence,
    q_target_worse,
)
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.significance import (
    Effect,
    benjamini_hochberg,
    interval,
    limit,
    rank_correlation,
)

MIN_SHARED_TEXTS = 10
"""Minimum number of texts to test a shared latent: with fewer, the p-value of a rank correlation is
not accurate."""
DIFFERENT, ALIKE = "used differently", "used alike"
NOTHING_SHOWN, UNTESTED = "nothing shown", "not tested"
OF_SHARED = (DIFFERENT, ALIKE, NOTHING_SHOWN, UNTESTED)
"""Verdicts on a shared latent, from strongest to weakest."""
SHARED_EFFECTS = ("its model's loss rises more by, nats", "its model's rises by, nats")
"""Short names of a shared latent's first two effects."""
CONTROLS = "other shared latents"


@dataclass(frozen=True)
class SharedTest:
    """Result of ablating a shared latent in both models."""

    source: ModelName
    """The model in which its decoder is stronger."""
    n_texts: int
    source_rise: EffectView
    target_rise: EffectView
    difference: EffectView
    """By how much more the source's loss rises than the target's."""
    p_different: float
    """The p-value of the hypothesis that this difference is no larger than that of the controls; 1
    if it is not beyond their 95th percentile."""
    correlation: float
    """Spearman's correlation of the two rises over texts."""
    p_alike: float
    """The p-value of the hypothesis that they do not correlate positively; 1 if the correlation is
    not beyond the controls' 95th percentile."""


def compared(rises: Mapping[ModelName, LossRises], source: ModelName) -> SharedTest | None:
    """Compare the two models' rises with those of the controls; none on too few texts."""
    own, other = rises[source], rises[OTHER[source]]
    if len(own.latent) < MIN_SHARED_TEXTS:
        return None
    difference = Effect(own.latent - other.latent, {CONTROLS: own.controls - other.controls})
    correlation, p_alike = rank_correlation(own.latent, other.latent)
    of_controls = [rank_correlation(*both)[0] for both in zip(own.controls, other.controls)]
    is_alike = correlation > limit(torch.tensor(of_controls))
    more = f"{source.upper()}'s loss rises more than {OTHER[source].upper()}'s by, nats"
    return SharedTest(
        source=source,
        n_texts=len(own.latent),
        source_rise=_view(_rise(source), Effect(own.latent, {CONTROLS: own.controls})),
        target_rise=_view(_rise(OTHER[source]), Effect(other.latent, {CONTROLS: other.controls})),
        difference=_view(more, difference),
        p_different=difference.p if difference.is_beyond else 1.0,
        correlation=correlation,
        p_alike=p_alike if is_alike else 1.0,
    )


def _rise(m: ModelName) -> str:
    return f"ablated in {m.upper()}: {m.upper()}'s loss rises by, nats"


def _view(name: str, effect: Effect) -> EffectView:
    return EffectView(name, effect.mean, *interval(effect.values), effect.limits)


class _Judged(NamedTuple):
    """A test of one latent with its adjusted p-values."""

    test: SharedTest
    different: float
    alike: float
    worse: float
    """That its target predicts worse after most of its firings."""


def shared_findings(
    results: Mapping[int, SharedTest | None], evidence: LatentEvidence
) -> list[Finding]:
    """A verdict on each shared latent that was ablated in both models.

    It is

    - `used differently` if its source's loss rises by more than its target's, beyond the difference
      that other shared latents' decoders make at the same places, and its target predicts worse
      after most of its firings;
    - else `used alike` if the two rises correlate over texts, beyond the correlation of the
      controls' rises;
    - else `nothing shown`, and `not tested` on too few texts.

    The tests are one-sided: a t-test over texts, and Spearman's. Each is at a false discovery rate
    of 5 % over all tested latents; that the target predicts worse, over all latents of the
    dictionary. Two models of the same text also lose unequally by a latent; that the target
    predicts worse where it fires separates these from a difference in what the models can predict.

    Args:
        results: Result of each test; none if there were too few texts.
        evidence: Evidence of exclusivity.
    """
    done = {i: one for i, one in results.items() if one is not None}
    different, alike = (
        benjamini_hochberg(torch.tensor(p)).tolist()
        for p in (
            [one.p_different for one in done.values()],
            [one.p_alike for one in done.values()],
        )
    )
    worse = q_target_worse(evidence)[list(done)].tolist()
    judged = zip(done.values(), different, alike, worse, strict=True)
    by_latent = dict(zip(done, (_Judged(*one) for one in judged), strict=True))
    return [_finding(latent, by_latent.get(latent), evidence) for latent in results]


def _finding(latent: int, one: _Judged | None, evidence: LatentEvidence) -> Finding:
    test = None if one is None else one.test
    return Finding(
        latent=latent,
        partition=SHARED,
        rank=0,
        description=None,
        detection=None,
        concerns=[],
        effects=[] if test is None else [test.difference, test.source_rise, test.target_rise],
        samples=[],
        verdict=UNTESTED if one is None else _verdict(one),
        reasons=[TOO_FEW] if one is None else _reasons(latent, one, evidence),
    )


TOO_FEW = f"It could be tested on fewer than {MIN_SHARED_TEXTS} texts of different documents."


def _verdict(one: _Judged) -> str:
    if max(one.different, one.worse) <= MAX_FALSE_DISCOVERIES:
        return DIFFERENT
    return ALIKE if one.alike <= MAX_FALSE_DISCOVERIES else NOTHING_SHOWN


def _reasons(latent: int, one: _Judged, evidence: LatentEvidence) -> list[str]:
    test, worse = one.test, evidence.target_worse[latent]
    source, target = test.source.upper(), OTHER[test.source].upper()
    follows = (
        f"How often {target} predicts worse after its firings was not measured."
        if worse.isnan()
        else f"After {worse:.0%} of its firings {target} predicts worse than {source} (q = {one.worse:.2g})."
    )
    return [
        follows,
        f"On {test.n_texts} texts, ablating it changes {source}'s loss on what follows by {test.source_rise.mean:+.3f} nats and {target}'s by "
        f"{test.target_rise.mean:+.3f}; the difference is compared with that of other shared latents at the same places (q = {one.different:.2g}).",
        f"Over these texts the two changes have a rank correlation of {test.correlation:.2f} (q = {one.alike:.2g}).",
    ]
