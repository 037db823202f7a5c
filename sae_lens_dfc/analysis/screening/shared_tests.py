"""Tests shared latents causally: each is ablated in both models."""

import torch

from sae_lens_dfc.analysis.causal.ablated_in_both import ablated_in_both
from sae_lens_dfc.analysis.options import MIN_TEXTS
from sae_lens_dfc.analysis.screening.candidates import windows
from sae_lens_dfc.analysis.screening.causal_tests import Subject
from sae_lens_dfc.analysis.screening.shared_verdicts import SharedTest, compared
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MIN_FIRINGS,
    MIN_WORSE,
    LatentEvidence,
    p_target_worse,
)

N_TEXTS = 64
"""Texts on which a shared latent is tested, at most: with 32, half as many of the latents that one
model alone uses were found."""


def shared_latents(evidence: LatentEvidence, keep: int) -> list[int]:
    """The shared latents to ablate in both models: first those after whose firings the target
    predicts worse, most clearly first, then as many others, evenly spaced over the dictionary, for
    comparison.

    Args:
        evidence: Evidence for each latent.
        keep: Maximum number of each.
    """
    tests = (~evidence.is_candidate & (evidence.firings >= MIN_FIRINGS)).cpu()
    worse = tests & (evidence.target_worse > MIN_WORSE).cpu()
    first = [int(i) for i in p_target_worse(evidence).cpu().argsort() if worse[i]][:keep]
    tests[first] = False
    others = tests.nonzero()[:, 0]
    evenly = torch.linspace(0, max(0, len(others) - 1), min(keep, len(others))).long()
    return first + others[evenly].tolist()


def tested_in_both(on: Subject, evidence: LatentEvidence, latent: int) -> SharedTest | None:
    """Ablate a shared latent in both models on texts in which it fires; none if there are too
    few."""
    places = on.gathered.random_places(latent, N_TEXTS)
    contexts = on.data.contexts
    # What follows is measured up to the next pair.
    upto = [place._replace(segment=place.segment + 1) for place in places]
    known = [place for place in upto if place.segment < len(contexts[place.context].segments)]
    if len(known) < MIN_TEXTS:
        return None
    found = ablated_in_both(on.crosscoder, on.pair, latent, windows(on.pair, contexts, known))
    return compared(found, "a" if evidence.is_a[latent] else "b")
