"""Affine maps between two models' activations: how a direction of one is written in the other."""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.metrics.moments import PairMoments

RIDGE = 1e-4


@dataclass(frozen=True)
class Stitching:
    """Affine maps of raw activations from model A to model B and back.

    Directions (decoder rows, steering vectors) move by the matrix alone, without the bias (arXiv 2506.06609).

    >>> stitching = Stitching(torch.ones(2), torch.zeros(3), torch.ones(2, 3), torch.ones(3, 2))
    >>> stitching.to_b(torch.tensor([[2.0, 1.0]])), stitching.direction_to_b(torch.tensor([2.0, 1.0]))
    (tensor([[1., 1., 1.]]), tensor([3., 3., 3.]))
    """

    mean_a: Float[Tensor, " d_a"]
    mean_b: Float[Tensor, " d_b"]
    a_to_b: Float[Tensor, "d_a d_b"]
    b_to_a: Float[Tensor, "d_b d_a"]

    def to(self, device: torch.device | str) -> "Stitching":
        """The same maps on another device."""
        return Stitching(*(getattr(self, f.name).to(device) for f in fields(self)))

    def to_b(self, acts_a: Float[Tensor, "*batch d_a"]) -> Float[Tensor, "*batch d_b"]:
        """What model B's activations are expected to be, given model A's."""
        return (acts_a - self.mean_a) @ self.a_to_b + self.mean_b

    def to_a(self, acts_b: Float[Tensor, "*batch d_b"]) -> Float[Tensor, "*batch d_a"]:
        """What model A's activations are expected to be, given model B's."""
        return (acts_b - self.mean_b) @ self.b_to_a + self.mean_a

    def direction_to_b(self, direction: Float[Tensor, "*batch d_a"]) -> Float[Tensor, "*batch d_b"]:
        """A direction of model A in model B."""
        return direction @ self.a_to_b

    def direction_to_a(self, direction: Float[Tensor, "*batch d_b"]) -> Float[Tensor, "*batch d_a"]:
        """A direction of model B in model A."""
        return direction @ self.b_to_a


def fit_stitching(
    moments: PairMoments,
    d_a: int,
    method: Literal["ridge", "gradient"] = "ridge",
    ridge: float = RIDGE,
    inversion_weight: float = 1.0,
) -> Stitching:
    """The maps that fit paired activations best.

    `ridge` solves each direction by itself in closed form: `P = (C_aa + r I)^-1 C_ab`, with `C` the covariances and `r` the
    mean variance of A's dimensions times `ridge`. `gradient` starts there and minimises (arXiv 2506.06609), both
    models scaled to a mean squared activation of 1,

        MSE(x_a P, x_b) + MSE(x_b Q, x_a) + w MSE(x_a P Q, x_a) + w MSE(x_b Q P, x_b)

    by L-BFGS. Both see the data through its moments only, so that no pass over it is repeated.

    Args:
        moments: Of the pairs to fit.
        d_a: Width of model A.
        method: See above.
        ridge: Share of the mean variance that is added to every dimension's.
        inversion_weight: `w`, the penalty on maps that are not each other's inverse; of `gradient` only.

    Raises:
        ValueError: A model's activations do not vary or are not finite, or the map is beyond float32.
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
    a_to_b = _ridge(covariance[a, a], covariance[a, b], ridge)
    b_to_a = _ridge(covariance[b, b], covariance[b, a], ridge)
    if method == "gradient":
        a_to_b, b_to_a = _descend(covariance, a_to_b, b_to_a, inversion_weight)
    maps = a_to_b.float(), b_to_a.float()
    if not all(x.isfinite().all() for x in maps):
        raise ValueError(
            "No map between the models: one's activations are so much larger than the other's that its numbers are beyond "
            "float32. Check the hooks."
        )
    return Stitching(mean[a].float(), mean[b].float(), *maps)


def _ridge(
    own: Float[Tensor, "d_from d_from"], cross: Float[Tensor, "d_from d_to"], ridge: float
) -> Float[Tensor, "d_from d_to"]:
    penalty = ridge * own.diagonal().mean() * torch.eye(len(own)).to(own)
    return torch.linalg.solve(own + penalty, cross)


def _descend(
    covariance: Tensor, a_to_b: Tensor, b_to_a: Tensor, inversion_weight: float
) -> tuple[Tensor, Tensor]:
    d_a, d_b = a_to_b.shape
    a, b = slice(0, d_a), slice(d_a, None)
    scales = [covariance[m, m].diagonal().mean().rsqrt() for m in (a, b)]
    scale = torch.cat([s.expand(d) for s, d in zip(scales, (d_a, d_b), strict=True)])
    C = covariance * scale[:, None] * scale
    P, Q = a_to_b * scales[1] / scales[0], b_to_a * scales[0] / scales[1]
    # A solution of a linear system lies in memory by columns, which L-BFGS cannot flatten.
    P, Q = (w.clone(memory_format=torch.contiguous_format).requires_grad_() for w in (P, Q))

    def loss() -> Tensor:
        fit = mse(C[a, a], C[a, b], C[b, b], P) + mse(C[b, b], C[b, a], C[a, a], Q)
        there_and_back = mse(C[a, a], C[a, a], C[a, a], P @ Q) + mse(
            C[b, b], C[b, b], C[b, b], Q @ P
        )
        return fit + inversion_weight * there_and_back

    optimizer = torch.optim.LBFGS([P, Q], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(closure)
    return P.detach() * scales[0] / scales[1], Q.detach() * scales[1] / scales[0]


def mse(
    own: Float[Tensor, "d_from d_from"],
    cross: Float[Tensor, "d_from d_to"],
    target: Float[Tensor, "d_to d_to"],
    weight: Float[Tensor, "d_from d_to"],
) -> Float[Tensor, ""]:
    """Mean over dimensions of the squared error of `x weight` for `y`, from the covariances of `x` and `y`.

    >>> x = torch.tensor([[2.0]])  # y = x, guessed as x / 2
    >>> mse(x, x, x, torch.tensor([[0.5]])).item()
    0.5
    """
    explained = (weight * (2 * cross - own @ weight)).sum()
    return (target.diagonal().sum() - explained) / len(target)


def stitching_quality(stitching: Stitching, held_out: PairMoments) -> dict[str, float]:
    """Share of each model's variance on held-out pairs that the maps explain.

    `stitching/a_to_b` of model B's from model A's activations, `stitching/b_to_a` the reverse; `stitching/a_to_b_to_a`
    and `stitching/b_to_a_to_b` of a model's own after both maps.
    """
    d_a = len(stitching.mean_a)
    a, b = slice(0, d_a), slice(d_a, None)
    C, mean = held_out.covariance, held_out.mean
    P, Q = stitching.a_to_b.to(C), stitching.b_to_a.to(C)
    off = mean[a] - stitching.mean_a, mean[b] - stitching.mean_b

    def explained(x: slice, y: slice, weight: Tensor, off_x: Tensor, off_y: Tensor) -> float:
        # The maps go through the means of what they were fitted on, which are not quite these.
        bias = (off_x @ weight - off_y).pow(2).mean()
        error = mse(C[x, x], C[x, y], C[y, y], weight) + bias
        return (1 - error / C[y, y].diagonal().mean()).item()

    return {
        "stitching/a_to_b": explained(a, b, P, off[0], off[1]),
        "stitching/b_to_a": explained(b, a, Q, off[1], off[0]),
        "stitching/a_to_b_to_a": explained(a, a, P @ Q, off[0], off[0]),
        "stitching/b_to_a_to_b": explained(b, b, Q @ P, off[1], off[1]),
    }


MIN_SHARED_VARIANCE = 0.5


def have_one_basis(moments: PairMoments, d_a: int) -> bool:
    """Whether a direction of one model is the same direction of the other: so it is for a model and its fine-tune.

    They have one when the widths are equal and A's activations, taken as they are but for their mean, explain at least half of the
    variance of B's.

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
