"""Recovery metrics: how many of a toy pair's known features a crosscoder finds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, EXCLUSIVE_TO, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.metrics.exclusivity.decoders import MIN_COSINE, ONE_SIDED, relative_decoder_norms
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.metrics.token_frequency import N_DECILES

OF_CALLS = (
    "evidence_recall",
    "evidence_precision",
    "evidence_called",
    "evidence_significant_share",
)
"""The metrics of `recovery_of_calls`."""


@dataclass(frozen=True)
class Truth:
    """Ground-truth features of two models.

    Args:
        features: Partition into A-exclusive, B-exclusive and shared features.
        directions: Each feature's direction in A and in B, concatenated on the last axis.
        frequencies: Probability with which each feature fires.
    """

    features: Partition
    directions: Float[Tensor, "n_features d_in"]
    frequencies: Float[Tensor, " n_features"]


def called_exclusive(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " d_sae"],
    by: Literal["partition", "relative_norm"],
) -> dict[str, Int[Tensor, " _"]]:
    """The latents classified as A-exclusive, B-exclusive and shared; dead latents are left out.

    Args:
        crosscoder: The saved form.
        alive: Which latents fire.
        by: Criterion: `partition` for a DFC, `relative_norm` (relative decoder norm) for all
            others.
    """
    if by == "partition":
        return {
            name: alive[latents].nonzero()[:, 0] + latents.start
            for name, latents in crosscoder.partition.slices.items()
        }
    relative = relative_decoder_norms(crosscoder).cpu()
    a, b = relative > ONE_SIDED, relative < 1 - ONE_SIDED
    called = {A_EXCLUSIVE: a, B_EXCLUSIVE: b, SHARED: ~(a | b)}
    return {name: (alive & mask).nonzero()[:, 0] for name, mask in called.items()}


def cosines(
    truth: Truth, W_dec: Float[Tensor, "d_sae d_in"]
) -> dict[str, Float[Tensor, "n_features d_sae"]]:
    """Cosine of each feature with each latent's decoder, in each model; 0 if either is absent."""
    return {
        model: normalize(truth.directions[:, inputs], dim=-1) @ normalize(W_dec[:, inputs]).T
        for model, inputs in truth.features.models.items()
    }


def matched(similarity: Float[Tensor, "n_features latents"]) -> Bool[Tensor, " n_features"]:
    """Which features match a latent with cosine above `MIN_COSINE`, each latent matching at most
    one feature.

    >>> matched(torch.tensor([[0.9, 0.95], [0.85, 0.1], [0.2, 0.99]]))  # three features, two latents
    tensor([ True, False,  True])
    """
    found = torch.zeros(len(similarity), dtype=torch.bool)
    # Pairs below the cosine gain nothing, so the assignment maximizes the number of matches, then
    # their cosines.
    gain = torch.where(similarity > MIN_COSINE, 1 + similarity / 1e3, 0).numpy()
    rows, columns = linear_sum_assignment(gain, maximize=True)
    found[torch.from_numpy(rows[gain[rows, columns] > 0])] = True
    return found


@torch.no_grad()
def recovery(
    crosscoder: Crosscoder,
    truth: Truth,
    alive: Bool[Tensor, " d_sae"],
    by: Literal["partition", "relative_norm"],
) -> dict[str, float | list[float | None] | None]:
    """Which known features a crosscoder learned, and which of its exclusive latents are true
    positives.

    An exclusive feature is *learned* if some latent matches its direction in that model, and
    *recalled* if a latent called exclusive to that model does. A shared feature is recalled if one
    latent called shared matches its direction in both models. In each of these counts a latent
    matches at most one feature (Hungarian algorithm; the paper allows several), so if two latents
    match one feature, one is a false positive.

    Args:
        crosscoder: The saved form.
        truth: The features.
        alive: Which latents fire; dead ones are ignored.
        by: Criterion for exclusive latents; see `called_exclusive`.

    Returns:
        `exclusive_recall`, `exclusive_learned` and `shared_recall`: fractions of the features.
            `exclusive_precision` and `false_exclusive_rate`: fractions of the latents called
            exclusive that do, or do not, match an exclusive feature of that model; none if no
            latent is called exclusive. `exclusive_called`: their number. `leakage`: fraction of the
            shared features whose direction is matched, in its model, by a latent called exclusive.
            `…/by_frequency`: the three fractions of features by frequency decile, rarest first;
            none for a decile without such features.
    """
    alive = alive.cpu()
    called = called_exclusive(crosscoder, alive, by)
    W_dec = crosscoder.W_dec.detach().float().cpu()
    return recovery_by(W_dec, truth, called, living=alive.nonzero()[:, 0])


def recovery_by(
    W_dec: Float[Tensor, "latents d_in"],
    truth: Truth,
    called: Mapping[str, Int[Tensor, " _"]],
    living: Int[Tensor, " _"],
) -> dict[str, float | list[float | None] | None]:
    """The metrics of `recovery` for any decoder directions and any classification.

    Args:
        W_dec: Directions in A and in B, concatenated on the last axis.
        truth: The features.
        called: Indices of the directions called A-exclusive, B-exclusive and shared, by partition
            name.
        living: Indices of the directions that count for whether a feature is learned.
    """
    similarity = cosines(truth, W_dec)
    slices, n = truth.features.slices, truth.features.d_sae
    recalled, learned, leaked = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
    for model, name in EXCLUSIVE_TO.items():
        features = slices[name]
        recalled[features] = matched(similarity[model][features][:, called[name]])
        learned[features] = matched(similarity[model][features][:, living])
        shared = similarity[model][slices[SHARED]][:, called[name]]
        leaked[slices[SHARED]] |= (shared > MIN_COSINE).any(dim=1)
    both = torch.minimum(similarity["a"], similarity["b"])
    recalled[slices[SHARED]] = matched(both[slices[SHARED]][:, called[SHARED]])

    exclusive = torch.arange(n) < slices[SHARED].start
    n_called = len(called[A_EXCLUSIVE]) + len(called[B_EXCLUSIVE])
    true = int(recalled[exclusive].sum())
    precision = true / n_called if n_called > 0 else None
    groups = {
        "exclusive_recall": (recalled, exclusive),
        "exclusive_learned": (learned, exclusive),
        "shared_recall": (recalled, ~exclusive),
    }
    deciles = frequency_deciles(truth.frequencies)
    return {
        **{name: share(found[group]) for name, (found, group) in groups.items()},
        "exclusive_precision": precision,
        "false_exclusive_rate": None if precision is None else 1 - precision,
        "exclusive_called": n_called,
        "leakage": share(leaked[~exclusive]),
        **{
            f"{name}/by_frequency": [share(found[group & (deciles == i)]) for i in range(N_DECILES)]
            for name, (found, group) in groups.items()
        },
    }


@torch.no_grad()
def recovery_of_calls(
    crosscoder: Crosscoder, truth: Truth, evidence: LatentEvidence
) -> dict[str, float | None]:
    """Recall and precision for exclusive features when latents are called exclusive by evidence,
    not by partition.

    Args:
        crosscoder: The saved form.
        truth: The features.
        evidence: Evidence for its latents.

    Returns:
        `evidence_recall`: fraction of the exclusive features matched by a latent called exclusive,
            each latent matching at most one; none if there are no such features.
            `evidence_precision`: fraction of the called latents that match one; none if none is
            called. `evidence_called`: their number. `evidence_significant_share`: their fraction of all
            latents.
    """
    similarity = cosines(truth, crosscoder.W_dec.detach().float().cpu())
    called, is_a = evidence.is_exclusive.cpu(), evidence.is_a.cpu()
    found = torch.cat(
        [
            matched(similarity[model][truth.features.slices[name]][:, called & own])
            for (model, name), own in zip(EXCLUSIVE_TO.items(), (is_a, ~is_a), strict=True)
        ]
    )
    n_called = int(called.sum())
    return {
        "evidence_recall": share(found),
        "evidence_precision": int(found.sum()) / n_called if n_called > 0 else None,
        "evidence_called": n_called,
        "evidence_significant_share": n_called / len(called),
    }


def frequency_deciles(frequencies: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Decile of each frequency; 0 is the rarest.

    >>> frequency_deciles(torch.tensor([0.5, 0.1, 0.9]))
    tensor([3, 0, 6])
    """
    ranks = frequencies.argsort().argsort()
    return ranks * N_DECILES // len(frequencies)


def share(found: Bool[Tensor, " _"]) -> float | None:
    """Fraction that is true; none if empty."""
    return found.double().mean().item() if len(found) > 0 else None
