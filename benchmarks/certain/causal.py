"""Tests latents causally: those called exclusive in their own model, and shared ones in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from benchmarks.certain.score import MIN_SHARE, on_languages
from sae_lens_dfc.analysis.screening.causal_tests import Sizes, Subject, causal_tests
from sae_lens_dfc.analysis.screening.shared_tests import (
    SharedSizes,
    shared_choice,
    tested_in_both,
)
from sae_lens_dfc.analysis.screening.shared_verdicts import ALIKE, DIFFERENT, shared_findings
from sae_lens_dfc.analysis.screening.verdicts import EXCLUSIVE_USED, findings
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking

SIZES = Sizes(with_samples=False)
Languages = Mapping[str, Float[Tensor, " d_sae"]]
"""Share of each latent's firings by language, from `firings_by_group`."""
KnownTo = Mapping[str, Sequence[str]]
"""The languages that only one side's model knows, by side."""


@dataclass(frozen=True)
class CausalSizes:
    """How much is tested causally."""

    n_tested: int = 8
    """Called latents of each side that are tested, those with the most evidence."""
    n_shared: int = 16
    """Shared latents that are ablated in both models because the target predicts worse after them,
    and as many others."""
    shared_texts: int = 64
    """Texts for each of these."""
    shared_controls: int = 6


def used(
    on: Subject,
    evidence: LatentEvidence,
    shares: Languages,
    known_to: KnownTo,
    sizes: CausalSizes,
) -> dict[str, dict[str, int]]:
    """For each side, of the first latents that are called: how many are `tested`, are `used`
    (verdict `exclusive and used`), and are `right`, used and of the side's language.

    Args:
        on: The crosscoder with its whole models and held-out text.
        evidence: Evidence for each latent.
        shares: Share of each latent's firings by language.
        known_to: The languages that only this side's model knows.
        sizes: How much is tested.
    """
    order = [int(i) for i in ranking(evidence) if evidence.is_exclusive[i]]
    sides = {
        A_EXCLUSIVE: [i for i in order if evidence.is_a[i]][: sizes.n_tested],
        B_EXCLUSIVE: [i for i in order if not evidence.is_a[i]][: sizes.n_tested],
    }
    latents = [i for of_side in sides.values() for i in of_side]
    if not latents:
        return {side: dict.fromkeys(("tested", "used", "right"), 0) for side in sides}
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
    on: Subject,
    evidence: LatentEvidence,
    shares: Languages,
    known_to: KnownTo,
    sizes: CausalSizes,
) -> dict[str, dict[str, int]]:
    """For each side, of the shared latents that are ablated in both models: how many are tested
    because the target predicts worse after them (`worse`, and `worse_right` of the side's
    language), how many of all are used differently (`different`, `different_right`), and, of the
    `others`, how many are used alike (`alike`). Arguments as for `used`."""
    # As in a screening, models of one basis are compared by their decoders.
    keep = 0 if on.one_basis else sizes.n_shared
    of_shared = SharedSizes(sizes.shared_texts, sizes.shared_controls)
    choice = shared_choice(evidence, keep, of_shared)
    results = {
        i: tested_in_both(on, bool(evidence.is_a[i]), i, choice.controls, of_shared)
        for i in (*choice.chosen, *choice.others)
    }
    found = shared_findings(results, evidence)
    verdicts = {one.latent: one.verdict for one in found if results[one.latent] is not None}
    counts: dict[str, dict[str, int]] = {}
    for side, is_a in ((A_EXCLUSIVE, True), (B_EXCLUSIVE, False)):
        own = [i for i in verdicts if bool(evidence.is_a[i]) == is_a]
        right = {i for i in own if _is_right(shares, known_to, side, i)}
        worse = [i for i in own if i in choice.chosen]
        different = [i for i in own if verdicts[i] == DIFFERENT]
        others = [i for i in own if i in choice.others]
        counts[side] = {
            "worse": len(worse),
            "worse_right": len(right.intersection(worse)),
            "different": len(different),
            "different_right": len(right.intersection(different)),
            "others": len(others),
            "alike": sum(verdicts[i] == ALIKE for i in others),
        }
    return counts


def _is_right(shares: Languages, known_to: KnownTo, side: str, latent: int) -> bool:
    return on_languages(shares, known_to.get(side, ()))[latent].item() > MIN_SHARE
