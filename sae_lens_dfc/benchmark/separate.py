"""Two models' own sparse autoencoders, matched afterwards: what has no counterpart is called exclusive."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.recovery import Truth, recovery_by

LIMIT_QUANTILE = 0.99
"""Share of the latents whose best correlation on wrong pairs lies below the one that a counterpart must have."""


class Matches(NamedTuple):
    """Which latents of the two dictionaries belong together."""

    limit: float
    """Correlation above which a latent has a counterpart."""
    is_alone: Bool[Tensor, " d_sae"]
    """Which living latents have none in the other model."""
    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    """The pairs, one latent of each model for one of the other's."""


@torch.no_grad()
def match(
    crosscoder: Crosscoder, acts: Iterable[Float[Tensor, "_ d_in"]], alive: Bool[Tensor, " d_sae"]
) -> Matches:
    """Match the latents of A and of B by the correlation of their activations.

    The limit is set on the same rows wrongly paired, where every correlation is chance: the 99th percentile over the
    living latents of the best that each finds in the other model.

    Args:
        crosscoder: Two dictionaries, whose latents are all exclusive.
        acts: Batches of pairs, not those that anything is measured on.
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
    """Of each latent of A with each of B; 0 where one of them is dead."""
    covariance = moments.covariance
    scale = torch.where(alive, covariance.diagonal(), 0).clamp(min=1e-24).rsqrt() * alive
    return (covariance * scale[:, None] * scale)[:n_a, n_a:]


def _best(correlation: Float[Tensor, "n_a n_b"]) -> Float[Tensor, " d_sae"]:
    """The best of each latent, A's first."""
    return torch.cat([correlation.amax(dim=1), correlation.amax(dim=0)])


@torch.no_grad()
def recovery_of_matches(
    crosscoder: Crosscoder, truth: Truth, alive: Bool[Tensor, " d_sae"], matches: Matches
) -> dict[str, float | list[float | None] | None]:
    """The measures of `recovery`, of latents without a counterpart as exclusive ones and of a pair as one shared latent."""
    W_dec, n_a = crosscoder.W_dec.detach(), crosscoder.partition.n_a_exclusive
    pairs = W_dec[matches.a] + W_dec[matches.b]  # each is 0 in the other model
    alone = matches.is_alone.nonzero()[:, 0]
    called = {
        A_EXCLUSIVE: alone[alone < n_a],
        B_EXCLUSIVE: alone[alone >= n_a],
        SHARED: torch.arange(len(pairs)) + len(W_dec),
    }
    return recovery_by(torch.cat([W_dec, pairs]), truth, called, living=alive.nonzero()[:, 0])
