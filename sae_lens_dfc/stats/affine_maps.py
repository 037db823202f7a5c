"""Fits affine maps between two models' activations, and maps directions of one model to the
other."""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.stats.moments import PairMoments

RIDGE = 1e-4


@dataclass(frozen=True)
class AffineMaps:
    """Affine maps of raw activations from model A to model B and back.

    Directions (decoder rows, steering vectors) are mapped by the matrix alone, without the bias
    (arXiv 2506.06609).

    >>> affine_maps = AffineMaps(torch.ones(2), torch.zeros(3), torch.ones(2, 3), torch.ones(3, 2))
    >>> affine_maps.to_b(torch.tensor([[2.0, 1.0]])), affine_maps.direction_to_b(torch.tensor([2.0, 1.0]))
    (tensor([[1., 1., 1.]]), tensor([3., 3., 3.]))
    """

    mean_a: Float[Tensor, " d_a"]
    mean_b: Float[Tensor, " d_b"]
    a_to_b: Float[Tensor, "d_a d_b"]
    b_to_a: Float[Tensor, "d_b d_a"]

    def to(self, device: torch.device | str) -> "AffineMaps":
        """The same maps on another device."""
        return AffineMaps(*(getattr(self, f.name).to(device) for f in fields(self)))

    def to_b(self, acts_a: Float[Tensor, "*batch d_a"]) -> Float[Tensor, "*batch d_b"]:
        """Predict model B's activations from model A's."""
        return (acts_a - self.mean_a) @ self.a_to_b + self.mean_b

    def to_a(self, acts_b: Float[Tensor, "*batch d_b"]) -> Float[Tensor, "*batch d_a"]:
        """Predict model A's activations from model B's."""
        return (acts_b - self.mean_b) @ self.b_to_a + self.mean_a

    def direction_to_b(self, direction: Float[Tensor, "*batch d_a"]) -> Float[Tensor, "*batch d_b"]:
        """Map a direction of model A to model B."""
        return direction @ self.a_to_b

    def direction_to_a(self, direction: Float[Tensor, "*batch d_b"]) -> Float[Tensor, "*batch d_a"]:
        """Map a direction of model B to model A."""
        return direction @ self.b_to_a


def fit_affine_maps(
    moments: PairMoments,
    d_a: int,
    ridge: float = RIDGE,
) -> AffineMaps:
    """Fit the maps by ridge regression, each direction by itself.

    `P = (C_aa + r I)^-1 C_ab`, with `C` the covariances and `r` the mean variance of A's dimensions
    times `ridge`. The pairs are seen through their moments only.

    Args:
        moments: Moments of the pairs to fit.
        d_a: Width of model A.
        ridge: Share of the mean variance that is added to every dimension's.

    Raises:
        ValueError: A model's activations do not vary or are not finite, or a map overflows float32.
    """
    a, b = slice(0, d_a), slice(d_a, None)
    covariance, mean = moments.covariance, moments.mean
    for model, inputs in (("A", a), ("B", b)):
        variance = covariance.diagonal()[inputs].sum().item()
        if not 0 < variance < math.inf:
            raise ValueError(
                f"No map between the models: over {moments.n} pairs the variance of model {model}'s activations is {variance:g}. "
                "Check its hook, and give more text."
            )
    a_to_b = ridge_weights(covariance[a, a], covariance[a, b], ridge)
    b_to_a = ridge_weights(covariance[b, b], covariance[b, a], ridge)
    maps = a_to_b.float(), b_to_a.float()
    if not all(x.isfinite().all() for x in maps):
        raise ValueError(
            "No map between the models: one model's activations are so much larger than the other's that the map overflows "
            "float32. Check the hooks."
        )
    return AffineMaps(mean[a].float(), mean[b].float(), *maps)


def ridge_weights(
    own: Float[Tensor, "d_from d_from"], cross: Float[Tensor, "d_from d_to"], ridge: float
) -> Float[Tensor, "d_from d_to"]:
    """Ridge regression from covariances, with a penalty of `ridge` times the mean variance."""
    penalty = ridge * own.diagonal().mean() * torch.eye(len(own)).to(own)
    return torch.linalg.solve(own + penalty, cross)


def mse(
    own: Float[Tensor, "d_from d_from"],
    cross: Float[Tensor, "d_from d_to"],
    target: Float[Tensor, "d_to d_to"],
    weight: Float[Tensor, "d_from d_to"],
) -> Float[Tensor, ""]:
    """Mean squared error over dimensions of predicting `y` by `x weight`, from the covariances of
    `x` and `y`.

    >>> x = torch.tensor([[2.0]])  # y = x, predicted as x / 2
    >>> mse(x, x, x, torch.tensor([[0.5]])).item()
    0.5
    """
    explained = (weight * (2 * cross - own @ weight)).sum()
    return (target.diagonal().sum() - explained) / len(target)


def affine_map_quality(affine_maps: AffineMaps, held_out: PairMoments) -> dict[str, float]:
    """Share of variance on held-out pairs that the maps explain.

    `affine_map/a_to_b` is the share of model B's variance explained by mapping model A's
    activations, and `affine_map/b_to_a` the reverse; `affine_map/a_to_b_to_a` and
    `affine_map/b_to_a_to_b` are the shares of a model's own variance that mapping there and back
    preserves.
    """
    d_a = len(affine_maps.mean_a)
    a, b = slice(0, d_a), slice(d_a, None)
    C, mean = held_out.covariance, held_out.mean
    P, Q = affine_maps.a_to_b.to(C), affine_maps.b_to_a.to(C)
    off = mean[a] - affine_maps.mean_a, mean[b] - affine_maps.mean_b

    def explained(x: slice, y: slice, weight: Tensor, off_x: Tensor, off_y: Tensor) -> float:
        # The maps' means are those of the fitted pairs, which differ slightly from the held-out
        # means.
        bias = (off_x @ weight - off_y).pow(2).mean()
        error = mse(C[x, x], C[x, y], C[y, y], weight) + bias
        return (1 - error / C[y, y].diagonal().mean()).item()

    return {
        "affine_map/a_to_b": explained(a, b, P, off[0], off[1]),
        "affine_map/b_to_a": explained(b, a, Q, off[1], off[0]),
        "affine_map/a_to_b_to_a": explained(a, a, P @ Q, off[0], off[0]),
        "affine_map/b_to_a_to_b": explained(b, b, Q @ P, off[1], off[1]),
    }


MIN_SHARED_VARIANCE = 0.5


def have_one_basis(moments: PairMoments, d_a: int) -> bool:
    """Whether two models share a basis, so that a direction means the same in both, as for a model
    and its fine-tune.

    They do if the widths are equal and A's centered activations, used as a prediction of B's,
    explain at least half of the variance of B's.

    >>> moments = PairMoments.of([torch.tensor([[1.0, 1.1], [2.0, 2.2]])])
    >>> have_one_basis(moments, d_a=1), have_one_basis(PairMoments.of([torch.tensor([[1.0, 2.0], [2.0, 1.0]])]), d_a=1)
    (True, False)
    """
    variances = moments.covariance.diagonal()
    if 2 * d_a != len(variances) or not variances.sum() > 0:
        return False
    of_a, of_b = variances[:d_a].sum(), variances[d_a:].sum()
    both = moments.covariance.diagonal(offset=d_a).sum()
    return bool(of_a + of_b - 2 * both <= (1 - MIN_SHARED_VARIANCE) * of_b)
