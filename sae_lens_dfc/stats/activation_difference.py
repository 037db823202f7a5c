"""The difference between two models' activations, in the basis of one of them."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.moments import PairMoments


class ActivationDifference(NamedTuple):
    """What has to be added to a model's activation to make it the other model's, or, between two
    bases, what an affine map makes of the other model's."""

    matrix: Float[Tensor, "d_in d_m"]
    bias: Float[Tensor, " d_m"]

    def of(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_m"]:
        """The difference of each pair of activations."""
        return acts.to(self.matrix) @ self.matrix + self.bias

    def mean(self, moments: PairMoments) -> Float[Tensor, " d_m"]:
        """The mean difference of pairs with these moments."""
        return self.of(moments.mean[None])[0]

    def components(self, moments: PairMoments, n: int) -> Float[Tensor, "d_m n"]:
        """The n orthonormal directions that hold most of the difference's mean square over pairs
        with these moments."""
        matrix = self.matrix.to(moments.covariance)
        mean = moments.mean @ matrix + self.bias.to(matrix)
        squares = matrix.T @ moments.covariance @ matrix + torch.outer(mean, mean)
        return torch.linalg.eigh(squares).eigenvectors.flip(1)[:, :n].to(self.matrix)


def activation_difference(
    model: Literal["a", "b"], d_a: int, d_b: int, affine_maps: AffineMaps | None
) -> ActivationDifference:
    """The difference in the basis of a model.

    Args:
        model: The model.
        d_a: Width of model A.
        d_b: Width of model B.
        affine_maps: Affine maps between the models; none if both share one basis.

    >>> activation_difference("a", 2, 2, None).of(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    tensor([[2., 3.]])
    """
    if affine_maps is None:
        other, bias = torch.eye(d_a), torch.zeros(d_a)
    else:
        d, direction, point = {
            "a": (d_b, affine_maps.direction_to_a, affine_maps.to_a),
            "b": (d_a, affine_maps.direction_to_b, affine_maps.to_b),
        }[model]
        device = affine_maps.mean_a.device
        other, bias = direction(torch.eye(d, device=device)), point(torch.zeros(d, device=device))
    own = -torch.eye(len(bias), device=bias.device)
    return ActivationDifference(torch.cat([own, other] if model == "a" else [other, own]), bias)
