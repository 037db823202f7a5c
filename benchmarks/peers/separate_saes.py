"""Matches the latents of two models' separate SAEs by correlation, and calls those without a
counterpart exclusive."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.recovery import Truth, recovery_by
from sae_lens_dfc.stats.moments import PairMoments

LIMIT_QUANTILE = 0.99
"""Quantile of the latents' best correlations on wrong pairs that a counterpart's correlation must
exceed."""


class Matches(NamedTuple):
    """Matching latents of two dictionaries."""

    limit: float
    """Correlation above which a latent has a counterpart."""
    is_alone: Bool[Tensor, " d_sae"]
    """Which alive latents have no counterpart in the other model."""
    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    """Matched pairs, one-to-one."""


@torch.no_grad()
def match(
    crosscoder: Crosscoder, acts: Iterable[Float[Tensor, "_ d_in"]], alive: Bool[Tensor, " d_sae"]
) -> Matches:
    """Match the latents of A and B by the correlation of their activations.

    The threshold is set on the same rows wrongly paired, where every correlation is due to chance:
    the 99th percentile over the alive latents of their best correlation in the other model.

    Args:
        crosscoder: Two dictionaries, whose latents are all exclusive.
        acts: Batches of pairs that are not used for evaluation.
        alive: Which latents fire.
    """
    n_a = crosscoder.partition.n_a_exclusive
    right, wrong = PairMoments(), PairMoments()
    for batch in acts:
        feature_acts = crosscoder.encode(batch)
        right.update(feature_acts)
        wrong.update(
            torch.cat([feature_acts[:, :n_a], feature_acts[:, n_a:].roll(1, dims=0)], dim=1)
        )
    correlation, chance = (_correlations(moments, n_a, alive) for moments in (right, wrong))
    limit = _best(chance)[alive].quantile(LIMIT_QUANTILE).item()
    is_alone = alive & (_best(correlation) <= limit)
    gain = torch.where(correlation > limit, correlation, 0).numpy()
    rows, columns = linear_sum_assignment(gain, maximize=True)
    paired = gain[rows, columns] > 0
    return Matches(
        limit, is_alone, torch.from_numpy(rows[paired]), torch.from_numpy(columns[paired]) + n_a
    )


def _correlations(
    moments: PairMoments, n_a: int, alive: Bool[Tensor, " d_sae"]
) -> Float[Tensor, "n_a n_b"]:
    """Correlation of each latent of A with each latent of B; 0 if one is dead."""
    covariance = moments.covariance
    scale = torch.where(alive, covariance.diagonal(), 0).clamp(min=1e-24).rsqrt() * alive
    return (covariance * scale[:, None] * scale)[:n_a, n_a:]


def _best(correlation: Float[Tensor, "n_a n_b"]) -> Float[Tensor, " d_sae"]:
    """Best correlation of each latent, A's first."""
    return torch.cat([correlation.amax(dim=1), correlation.amax(dim=0)])


@torch.no_grad()
def recovery_of_matches(
    crosscoder: Crosscoder, truth: Truth, alive: Bool[Tensor, " d_sae"], matches: Matches
) -> dict[str, float | list[float | None] | None]:
    """The measures of `recovery`, counting latents without a counterpart as exclusive and a matched
    pair as one shared latent."""
    W_dec, n_a = crosscoder.W_dec.detach(), crosscoder.partition.n_a_exclusive
    pairs = W_dec[matches.a] + W_dec[matches.b]  # each is 0 in the other model
    alone = matches.is_alone.nonzero()[:, 0]
    called = {
        A_EXCLUSIVE: alone[alone < n_a],
        B_EXCLUSIVE: alone[alone >= n_a],
        SHARED: torch.arange(len(pairs)) + len(W_dec),
    }
    return recovery_by(torch.cat([W_dec, pairs]), truth, called, living=alive.nonzero()[:, 0])
