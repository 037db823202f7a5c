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
class OtherModelTest:
    """Regression, over any number of batches, of the other model's unshared activations on each exclusive latent.

    What the shared latents explain of the other model is taken out first, so that a feature which
    merely fires together with another is not mistaken for it. What the other model's own exclusive
    latents explain is left in: there sits the twin, when one shared feature was split in two.
    The two halves of the data give two estimates of a slope, and their product has no bias from noise.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=2, n_b_exclusive=0, n_shared=1)
    >>> test = OtherModelTest(partition)
    >>> acts = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # latent 0 fires on the first pair, latent 1 on the second
    >>> for _ in range(2):
    ...     test.update(acts, unshared=torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    >>> test.compute(own_norms=torch.tensor([1.0, 1.0])).own_share  # B has nothing of latent 0, all of latent 1
    tensor([1.0000, 0.5000])
    """

    partition: Partition
    _n: int = 0
    _products: Float[Tensor, "2 n_exclusive d_in"] = field(init=False)
    _power: Float[Tensor, "2 n_exclusive"] = field(init=False)

    @property
    def n_exclusive(self) -> int:
        return self.partition.n_a_exclusive + self.partition.n_b_exclusive

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
        if self._n == 0:
            self._products = unshared.new_zeros(2, self.n_exclusive, self.partition.d_in)
            self._power = unshared.new_zeros(2, self.n_exclusive)
        half = self._n % 2
        self._products[half] += feature_acts.T @ unshared
        self._power[half] += feature_acts.pow(2).sum(dim=0)
        self._n += 1

    def compute(self, own_norms: Float[Tensor, " n_exclusive"]) -> Evidence:
        """The evidence.

        Args:
            own_norms: L2 norm of each exclusive latent's decoder in its own model, in the units of its activations.

        Raises:
            ValueError: Fewer than two batches were counted.
        """
        if self._n < 2:
            raise ValueError(f"A test needs at least two batches, got {self._n}.")
        halves = self._products / self._power.clamp(min=1e-12)[:, :, None]
        slopes = self._products.sum(dim=0) / self._power.sum(dim=0).clamp(min=1e-12)[:, None]
        squared = torch.zeros_like(own_norms)
        for name, other in ((A_EXCLUSIVE, "b"), (B_EXCLUSIVE, "a")):
            latents, inputs = self.partition.slices[name], self.partition.models[other]
            squared[latents] = (halves[0] * halves[1])[latents, inputs].sum(dim=-1)
        other_norms = squared.clamp(min=0).sqrt()
        return Evidence(
            slopes=slopes,
            own_share=own_norms / (own_norms + other_norms).clamp(min=1e-12),
            fired=(self._power > 0).all(dim=0),
        )
