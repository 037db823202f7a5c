"""What a crosscoder found of features that are known: the toy pairs' ground truth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED, Partition
from sae_lens_dfc.metrics.claims import LatentEvidence
from sae_lens_dfc.metrics.exclusivity import MIN_COSINE, ONE_SIDED, relative_decoder_norms
from sae_lens_dfc.metrics.frequency import N_DECILES

OF_CALLS = ("evidence_recall", "evidence_precision", "evidence_called", "evidence_called_share")
"""The measures of `recovery_of_calls`."""


@dataclass(frozen=True)
class Truth:
    """Known features of two models.

    Args:
        features: Which features are A's, B's and shared.
        directions: Each feature's direction in A and in B, joined on the last axis.
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
    """The latents an architecture calls A's own, B's own and shared; a dead latent is called nothing.

    Args:
        crosscoder: The saved form.
        alive: Which latents fire.
        by: `partition` for a DFC, whose partitions say it; `relative_norm` for all others.
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
    """Cosine of each feature with each latent's decoder, in each model; 0 where one of them is absent."""
    return {
        model: normalize(truth.directions[:, inputs], dim=-1) @ normalize(W_dec[:, inputs]).T
        for model, inputs in truth.features.models.items()
    }


def matched(similarity: Float[Tensor, "n_features latents"]) -> Bool[Tensor, " n_features"]:
    """Which features have a latent of their own above the cosine, each latent serving one feature.

    >>> matched(torch.tensor([[0.9, 0.95], [0.85, 0.1], [0.2, 0.99]]))  # three features, two latents
    tensor([ True, False,  True])
    """
    found = torch.zeros(len(similarity), dtype=torch.bool)
    # Below the cosine nothing is gained, so the assignment makes as many matches as can be, and the closest ones.
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
    """Which known features a crosscoder learned, and which of its exclusive latents are true.

    A feature that one model has is *learned* when some latent has its direction in that model, and
    *recalled* when a latent called exclusive to that model has. A shared feature needs one latent
    called shared that has its direction in both. In each of these counts a latent serves one
    feature (Hungarian algorithm; the paper lets it serve any), so of two latents with one feature
    one is false.

    Args:
        crosscoder: The saved form.
        truth: The features.
        alive: Which latents fire; dead ones are neither found nor false.
        by: What calls a latent exclusive; see `called_exclusive`.

    Returns:
        `exclusive_recall`, `exclusive_learned` and `shared_recall`: shares of the features;
        `exclusive_precision` and `false_exclusive_rate`: shares of the latents called exclusive that
        are a true feature of that model, and that are not, none when no latent is called so;
        `exclusive_called`: their number; `leakage`: share of the shared features whose direction
        some latent called exclusive has in its model; and the three shares of features by decile of
        frequency, rarest first (`…/by_frequency`, none where a decile has no such feature).
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
    """The measures of `recovery` of any decoder directions, whatever calls them exclusive.

    Args:
        W_dec: Directions in A and in B, joined on the last axis.
        truth: The features.
        called: Which of them are called A's own, B's own and shared, by partition name.
        living: Which of them count where a feature is learned.
    """
    similarity = cosines(truth, W_dec)
    slices, n = truth.features.slices, truth.features.d_sae
    recalled, learned, leaked = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
    for name, model in ((A_EXCLUSIVE, "a"), (B_EXCLUSIVE, "b")):
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
    """How many exclusive features are found, and how many of the calls are true, when evidence decides and not the partition.

    Args:
        crosscoder: The saved form.
        truth: The features.
        evidence: Of its latents.

    Returns:
        `evidence_recall`: share of the exclusive features that a latent called exclusive has, one latent for one feature, none
        where there is no such feature; `evidence_precision`: share of the latents called that have one, none when none is
        called; `evidence_called`: their number, and `evidence_called_share` of all latents.
    """
    similarity = cosines(truth, crosscoder.W_dec.detach().float().cpu())
    called, is_a = evidence.is_exclusive.cpu(), evidence.is_a.cpu()
    found = torch.cat(
        [
            matched(similarity[model][truth.features.slices[name]][:, called & own])
            for name, model, own in ((A_EXCLUSIVE, "a", is_a), (B_EXCLUSIVE, "b", ~is_a))
        ]
    )
    n_called = int(called.sum())
    return {
        "evidence_recall": share(found),
        "evidence_precision": int(found.sum()) / n_called if n_called > 0 else None,
        "evidence_called": n_called,
        "evidence_called_share": n_called / len(called),
    }


def frequency_deciles(frequencies: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The decile of each frequency, 0 the rarest.

    >>> frequency_deciles(torch.tensor([0.5, 0.1, 0.9]))
    tensor([3, 0, 6])
    """
    ranks = frequencies.argsort().argsort()
    return ranks * N_DECILES // len(frequencies)


def share(found: Bool[Tensor, " _"]) -> float | None:
    """The share that is true, none of nothing."""
    return found.double().mean().item() if len(found) > 0 else None
