"""The difference between two models' activations, in the basis of one of them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.moments import PairMoments


@dataclass(frozen=True)
class ActivationDifference:
    """What has to be added to a model's activation to make it the other model's, or, between two
    bases, what an affine map makes of the other model's."""

    matrix: Float[Tensor, "d_in d_m"]
    bias: Float[Tensor, " d_m"]
    mean: Float[Tensor, " d_m"]
    """Mean over the fitted pairs."""
    components: Float[Tensor, "d_m d_m"]
    """Orthonormal directions; the first n hold more of its mean square than any other n."""

    def of(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_m"]:
        """The difference of each pair of activations."""
        return acts.to(self.matrix) @ self.matrix + self.bias


def activation_difference(
    model: Literal["a", "b"], moments: PairMoments, d_a: int, affine_maps: AffineMaps | None
) -> ActivationDifference:
    """The difference in the basis of a model.

    Args:
        model: The model.
        moments: Moments of the pairs to fit.
        d_a: Width of model A.
        affine_maps: Affine maps between the models; none if both share one basis.

    >>> moments = PairMoments.of([torch.tensor([[1.0, 0.0, 4.0, 0.0], [3.0, 0.0, 6.0, 0.0]])])
    >>> difference = activation_difference("a", moments, 2, None)
    >>> difference.of(torch.tensor([[1.0, 2.0, 3.0, 5.0]])), difference.mean
    (tensor([[2., 3.]]), tensor([3., 0.]))
    """
    mean, covariance = moments.mean.cpu(), moments.covariance.cpu()
    d_b = len(mean) - d_a
    if affine_maps is None:
        other, bias = torch.eye(d_a), torch.zeros(d_a)
    else:
        maps = affine_maps.to("cpu")
        d, direction, point = {
            "a": (d_b, maps.direction_to_a, maps.to_a),
            "b": (d_a, maps.direction_to_b, maps.to_b),
        }[model]
        other, bias = direction(torch.eye(d)), point(torch.zeros(d))
    own = -torch.eye(len(bias))
    matrix = torch.cat([own, other] if model == "a" else [other, own])
    exact = matrix.double()
    of_mean = mean @ exact + bias.double()
    squares = exact.T @ covariance @ exact + torch.outer(of_mean, of_mean)
    components = torch.linalg.eigh(squares).eigenvectors.flip(1)
    return ActivationDifference(matrix, bias, of_mean.float(), components.float())
