"""Tests latents causally: those called exclusive in their own model, and shared ones in both."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from benchmarks.certain.score import MIN_SHARE, on_languages
from sae_lens_dfc.analysis.screening.causal_tests import Sizes, Subject, causal_tests
from sae_lens_dfc.analysis.screening.shared_tests import shared_latents, tested_in_both
from sae_lens_dfc.analysis.screening.shared_verdicts import ALIKE, DIFFERENT, shared_findings
from sae_lens_dfc.analysis.screening.verdicts import EXCLUSIVE_USED, findings
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking

N_TESTED = 8
"""Latents of each side that are tested, those with the most evidence."""
N_SHARED = 16
"""Shared latents that are ablated in both models: those after which one predicts worse most
clearly, and as many others."""
SIZES = Sizes(with_samples=False)
Languages = Mapping[str, Float[Tensor, " d_sae"]]
"""Share of each latent's firings by language, from `firings_by_group`."""
KnownTo = Mapping[str, Sequence[str]]
"""The languages that only one side's model knows, by side."""


def used(
    on: Subject, evidence: LatentEvidence, shares: Languages, known_to: KnownTo
) -> dict[str, dict[str, int]]:
    """For each side, of the first latents that are called: how many are `tested`, are `used`
    (verdict `exclusive and used`), and are `right`, used and of the side's language.

    Args:
        on: The crosscoder with its whole models and held-out text.
        evidence: Evidence for each latent.
        shares: Share of each latent's firings by language.
        known_to: The languages that only this side's model knows.
    """
    order = [int(i) for i in ranking(evidence) if evidence.is_exclusive[i]]
    sides = {
        A_EXCLUSIVE: [i for i in order if evidence.is_a[i]][:N_TESTED],
        B_EXCLUSIVE: [i for i in order if not evidence.is_a[i]][:N_TESTED],
    }
    latents = [i for of_side in sides.values() for i in of_side]
    test = causal_tests(on, latents, SIZES)
    results = {latent: test(latent) for latent in latents}
    found = findings(on.crosscoder, latents, results, {}, evidence, on.one_basis)
    are_used = {one.latent for one in found if one.verdict == EXCLUSIVE_USED}
    return {
        side: {
            "tested": sum(results[i] is not None for i in of_side),
            "used": sum(i in are_used for i in of_side),
            "right": sum(i in are_used and _is_right(shares, known_to, side, i) for i in of_side),
        }
        for side, of_side in sides.items()
    }


def in_both(
    on: Subject, evidence: LatentEvidence, shares: Languages, known_to: KnownTo
) -> dict[str, dict[str, int]]:
    """For each side, of the shared latents that are ablated in both models: how many are `tested`,
    are used differently (`different`), and used alike (`alike`); and of those used differently, how
    many are `right`, of the side's language. Arguments as for `used`."""
    latents = shared_latents(evidence, N_SHARED)
    results = {latent: tested_in_both(on, evidence, latent) for latent in latents}
    found = shared_findings(results, [SHARED] * len(results), evidence)
    counts: dict[str, dict[str, int]] = {}
    for side, is_a in ((A_EXCLUSIVE, True), (B_EXCLUSIVE, False)):
        own = [one for one in found if bool(evidence.is_a[one.latent]) == is_a]
        different = [one.latent for one in own if one.verdict == DIFFERENT]
        counts[side] = {
            "tested": sum(results[one.latent] is not None for one in own),
            "different": len(different),
            "right": sum(_is_right(shares, known_to, side, i) for i in different),
            "alike": sum(one.verdict == ALIKE for one in own),
        }
    return counts


def _is_right(shares: Languages, known_to: KnownTo, side: str, latent: int) -> bool:
    return on_languages(shares, known_to.get(side, ()))[latent].item() > MIN_SHARE
