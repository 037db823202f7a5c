"""Whether the other model has what an exclusive latent stands for."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, Partition


class Evidence(NamedTuple):
    """What a test of the exclusive latents found; A's come first, as everywhere."""

    slopes: Float[Tensor, "n_exclusive d_in"]
    """What each latent, at activation 1, is worth in the other model: the decoder it would have there if it had one."""
    own_share: Float[Tensor, " n_exclusive"]
    """`own / (own + other)` of the norms of a latent's decoder and of its slope: 1 when the other model has nothing of
    it, 1/2 when it has all of it. It is the relative decoder norm that a shared latent in its place would have."""
    fired: Bool[Tensor, " n_exclusive"]
    """Which latents fired often enough to be tested."""


@dataclass
class _Sums:
    """What a regression with an intercept needs: an activation is never negative, so its mean is no evidence."""

    n: int
    x: Float[Tensor, " n_x"]
    y: Float[Tensor, " n_y"]
    squares: Float[Tensor, " n_x"]
    products: Float[Tensor, "n_x n_y"]

    @classmethod
    def zeros_like(cls, x: Float[Tensor, "batch n_x"], y: Float[Tensor, "batch n_y"]) -> "_Sums":
        n_x, n_y = x.shape[1], y.shape[1]
        return cls(0, *(y.new_zeros(shape) for shape in ((n_x,), (n_y,), (n_x,), (n_x, n_y))))

    def add(self, x: Float[Tensor, "batch n_x"], y: Float[Tensor, "batch n_y"]) -> None:
        self.n += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.squares += x.pow(2).sum(dim=0)
        self.products += x.T @ y

    def slopes(self) -> Float[Tensor, "n_x n_y"]:
        covariance = self.products - torch.outer(self.x, self.y) / self.n
        variance = self.squares - self.x.pow(2) / self.n
        return covariance / variance.clamp(min=1e-12)[:, None]


@dataclass
class OtherModelTest:
    """Regression, over any number of batches, of the other model's unshared activations on each exclusive latent.

    What the shared latents explain of the other model is taken out first, so that a feature which
    merely fires together with another is not mistaken for it. What the other model's own exclusive
    latents explain is left in: there sits the twin, when one shared feature was split in two.
    The two halves of the data give two estimates of a slope, and their product has no bias from noise.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=2, n_b_exclusive=0, n_shared=1)
    >>> test = OtherModelTest(partition)
    >>> acts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    >>> for _ in range(2):  # B has nothing of latent 0 and all of latent 1
    ...     test.update(acts, unshared=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    >>> test.compute(own_norms=torch.tensor([1.0, 1.0])).own_share
    tensor([1.0000, 0.5000])
    """

    partition: Partition
    n_batches: int = 0
    """Batches counted so far."""
    _halves: list[_Sums] = field(default_factory=list)

    @torch.no_grad()
    def update(
        self,
        feature_acts: Float[Tensor, "batch n_exclusive"],
        unshared: Float[Tensor, "batch d_in"],
    ) -> None:
        """Count a batch in.

        Args:
            feature_acts: Activations of the exclusive latents.
            unshared: Normalised activations less what the shared latents explain.
        """
        if self.n_batches == 0:
            self._halves = [_Sums.zeros_like(feature_acts, unshared) for _ in range(2)]
        # Sums of many products, of which a mean is taken off: half precision would leave nothing of them.
        with torch.autocast(unshared.device.type, enabled=False):
            self._halves[self.n_batches % 2].add(feature_acts.to(unshared.dtype), unshared)
        self.n_batches += 1

    def compute(self, own_norms: Float[Tensor, " n_exclusive"]) -> Evidence:
        """The evidence.

        Args:
            own_norms: L2 norm of each exclusive latent's decoder in its own model, in the units of its activations.

        Raises:
            ValueError: Fewer than two batches were counted.
        """
        if self.n_batches < 2:
            raise ValueError(f"A test needs at least two batches, got {self.n_batches}.")
        halves = [half.slopes() for half in self._halves]
        squared = torch.zeros_like(own_norms)
        for name, other in ((A_EXCLUSIVE, "b"), (B_EXCLUSIVE, "a")):
            latents, inputs = self.partition.slices[name], self.partition.models[other]
            squared[latents] = (halves[0] * halves[1])[latents, inputs].sum(dim=-1)
        other_norms = squared.clamp(min=0).sqrt()
        return Evidence(
            slopes=(halves[0] + halves[1]) / 2,
            own_share=own_norms / (own_norms + other_norms).clamp(min=1e-12),
            fired=(self._halves[0].squares > 0) & (self._halves[1].squares > 0),
        )
