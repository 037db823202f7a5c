"""Compares the latents that are called exclusive with what is certain: which language they fire on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence

MIN_SHARE = 0.5
"""Share of its firings above which a latent is one of a language."""
OFTEN = 100
"""Held-out firings from which on a latent must be found."""


def on_languages(
    shares: Mapping[str, Float[Tensor, " d_sae"]], languages: Sequence[str]
) -> Float[Tensor, " d_sae"]:
    """Share of each latent's firings that is on some of the languages.

    >>> on_languages({"en": torch.tensor([0.2]), "de": torch.tensor([0.5])}, ["en", "de"])
    tensor([0.7000])
    >>> on_languages({"en": torch.tensor([0.2])}, [])
    tensor([0.])
    """
    every = torch.stack(list(shares.values()))
    return every[[name in languages for name in shares]].sum(dim=0)


def score(
    evidence: LatentEvidence,
    partition: Partition,
    shares: Mapping[str, Float[Tensor, " d_sae"]],
    known_to: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
    """For each side (`a_exclusive`, `b_exclusive`), the counts of latents.

    Args:
        evidence: Evidence for each latent.
        partition: The crosscoder's partition.
        shares: `firings_by_group`.
        known_to: The languages that only this side's model knows.

    Returns:
        `judged` and `called` of all candidates; `right`, the called ones of the side's languages;
            `often`, the latents of the partition that fire at least 100 times, `often_of_language`
            those of the side's languages, and how many of these are called (`often_called`,
            `often_of_language_called`); and of each judged latent `known`, `target_worse`,
            `language`, its share of firings on the side's languages, and `is_called`.
    """
    result: dict[str, dict[str, Any]] = {}
    for side, is_side in ((A_EXCLUSIVE, evidence.is_a), (B_EXCLUSIVE, ~evidence.is_a)):
        judged = evidence.is_judged & is_side
        called = evidence.is_exclusive & is_side
        share = on_languages(shares, known_to.get(side, ()))
        is_right = share > MIN_SHARE
        often = torch.zeros_like(judged)
        often[partition.slices[side]] = evidence.firings[partition.slices[side]] >= OFTEN
        result[side] = {
            "judged": int(judged.sum()),
            "called": int(called.sum()),
            "right": int((called & is_right).sum()),
            "often": int(often.sum()),
            "often_called": int((often & called).sum()),
            "often_of_language": int((often & is_right).sum()),
            "often_of_language_called": int((often & is_right & called).sum()),
            "known": _rounded(evidence.known[judged]),
            "target_worse": _rounded(evidence.target_worse[judged]),
            "language": _rounded(share[judged]),
            "is_called": evidence.is_exclusive[judged].tolist(),
        }
    return result


def _rounded(values: Float[Tensor, " n"]) -> list[float]:
    return [round(value, 3) for value in values.double().tolist()]
