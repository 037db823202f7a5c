"""Tests shared latents causally: each is ablated in both models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sae_lens_dfc.analysis.causal.ablated_in_both import ablated_in_both
from sae_lens_dfc.analysis.causal.activation_patching import texts_of
from sae_lens_dfc.analysis.screening.candidates import windows
from sae_lens_dfc.analysis.screening.causal_tests import Subject
from sae_lens_dfc.analysis.screening.shared_verdicts import (
    MIN_SHARED_TEXTS,
    SharedTest,
    compared,
)
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MAX_FALSE_DISCOVERIES,
    MIN_FIRINGS,
    LatentEvidence,
    p_worse,
    q_target_worse,
)


@dataclass(frozen=True)
class SharedSizes:
    """Sizes of a test of a shared latent."""

    texts: int = 32
    """Texts at most; the collected sample of firings limits them to 64."""
    controls: int = 4
    """Other shared latents whose decoders are ablated at the same places."""
    seed: int = 0


@dataclass(frozen=True)
class SharedChoice:
    """The shared latents to ablate in both models."""

    chosen: list[int]
    """Those after whose firings the target predicts worse; those first for which this is clearest
    on the text up to the next pair."""
    others: list[int]
    """As many others, evenly spaced over the dictionary, for comparison."""
    controls: list[int]
    """Random shared latents, none of the above."""


def shared_choice(evidence: LatentEvidence, keep: int, sizes: SharedSizes) -> SharedChoice:
    """Choose among the latents that are no candidates and fire often enough.

    Args:
        evidence: Evidence for each latent.
        keep: Maximum number of chosen latents, and of others.
        sizes: Sizes of the tests.
    """
    could = (~evidence.is_candidate & (evidence.firings >= MIN_FIRINGS)).cpu()
    q = q_target_worse(evidence).cpu()
    # An ablation is measured on the text up to the next pair.
    order = p_worse(evidence.next_worse, evidence.next_worse_se).cpu().argsort(stable=True)
    chosen = [int(i) for i in order if could[i] and q[i] <= MAX_FALSE_DISCOVERIES][:keep]
    could[chosen] = False
    rest = could.nonzero()[:, 0]
    evenly = torch.linspace(0, max(0, len(rest) - 1), min(keep, len(rest))).long()
    others = rest[evenly].tolist()
    could[others] = False
    rest = could.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(sizes.seed)
    drawn = rest[torch.randperm(len(rest), generator=generator)][: sizes.controls]
    return SharedChoice(chosen, others, drawn.tolist())


def tested_in_both(
    on: Subject, is_a: bool, latent: int, controls: Sequence[int], sizes: SharedSizes
) -> SharedTest | None:
    """Ablate a shared latent in both models, on texts of different documents in which it fires;
    none if there are too few.

    Args:
        on: The crosscoder with its whole models and held-out text.
        is_a: Whether its source is model A.
        latent: The latent.
        controls: Other shared latents.
        sizes: Sizes of the test.
    """
    contexts = on.data.contexts
    # What follows is measured up to the next pair.
    upto = [
        place._replace(segment=place.segment + 1)
        for place in on.gathered.random_places(latent)
        if place.segment + 1 < len(contexts[place.context].segments)
    ]
    documents = {(contexts[p.context].source, contexts[p.context].document): p for p in upto}
    places = list(documents.values())[: sizes.texts]
    if len(places) < MIN_SHARED_TEXTS or not controls:
        return None
    read = windows(on.pair, contexts, places)
    texts = texts_of(on.crosscoder, on.pair, latent, read, n_after=1)
    if len(texts.rows.contexts) < MIN_SHARED_TEXTS:
        return None
    rises = ablated_in_both(on.crosscoder, on.pair, latent, texts, controls)
    return compared(rises, "a" if is_a else "b")
