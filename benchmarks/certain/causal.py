"""Tests the latents called exclusive causally, in their own model."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from benchmarks.certain.score import MIN_SHARE, on_languages
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.analysis.screening.causal_tests import Sizes, causal_tests, subject_of
from sae_lens_dfc.analysis.screening.verdicts import EXCLUSIVE_USED, findings
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking

N_TESTED = 8
"""Latents of each side that are tested, those with the most evidence."""
SIZES = Sizes(with_samples=False)


def used(
    crosscoder: Crosscoder,
    task: PairTask,
    evidence: LatentEvidence,
    shares: Mapping[str, Float[Tensor, " d_sae"]],
    known_to: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, int]]:
    """For each side, of the first latents that are called: how many are `tested`, are `used`
    (verdict `exclusive and used`), and are `right`, used and of the side's language.

    Args:
        crosscoder: The crosscoder.
        task: The whole models and their data.
        evidence: Evidence for each latent.
        shares: `firings_by_group`.
        known_to: The languages that only this side's model knows.
    """
    order = [int(i) for i in ranking(evidence) if evidence.is_exclusive[i]]
    sides = {
        A_EXCLUSIVE: [i for i in order if evidence.is_a[i]][:N_TESTED],
        B_EXCLUSIVE: [i for i in order if not evidence.is_a[i]][:N_TESTED],
    }
    latents = [i for of_side in sides.values() for i in of_side]
    if not latents:
        return {side: dict.fromkeys(("tested", "used", "right"), 0) for side in sides}
    on = subject_of(crosscoder, task.pair, task.data)
    test = causal_tests(on, latents, SIZES)
    results = {latent: test(latent) for latent in latents}
    found = findings(crosscoder, latents, results, {}, evidence, on.one_basis)
    are_used = {one.latent for one in found if one.verdict == EXCLUSIVE_USED}

    def is_right(side: str, latent: int) -> bool:
        return on_languages(shares, known_to.get(side, ()))[latent].item() > MIN_SHARE

    return {
        side: {
            "tested": sum(results[i] is not None for i in of_side),
            "used": sum(i in are_used for i in of_side),
            "right": sum(i in are_used and is_right(side, i) for i in of_side),
        }
        for side, of_side in sides.items()
    }
