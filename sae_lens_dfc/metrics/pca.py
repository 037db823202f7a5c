"""PCA baseline: variance explained by the principal components of both models' concatenated
activations."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.stats.moments import PairMoments


@dataclass(frozen=True)
class JointPCA:
    """The leading principal components of the two models' concatenated, normalized activations."""

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]
    components: Float[Tensor, "k d_in"]

    @classmethod
    def fit(
        cls, acts: Iterable[Float[Tensor, "_ d_in"]], partition: Partition, k: int
    ) -> "JointPCA":
        """Fit components to raw activations, after scaling both models to the same total variance.

        Args:
            acts: Batches of raw activations.
            partition: Which columns belong to which model.
            k: Number of components.

        Raises:
            ValueError: There are no activations, or a model's have no variance or are not finite.
        """
        moments = PairMoments.of(tqdm(acts, "Principal components", leave=False))
        center, covariance = moments.mean, moments.covariance
        scale = torch.ones_like(center)
        for model, inputs in partition.models.items():
            variance = covariance.diagonal()[inputs].sum()
            if not 0 < variance < math.inf:
                raise ValueError(
                    f"No principal components: over {moments.n} pairs the variance of model {model.upper()}'s activations is "
                    f"{variance:g}. Check its hook, and give more text."
                )
            scale[inputs] = variance.rsqrt()
        _, vectors = torch.linalg.eigh(covariance * scale[:, None] * scale)
        return cls(center.float(), scale.float(), vectors[:, -k:].T.float())

    def reconstruct(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Raw activations reconstructed from the components alone."""
        x = (acts - self.mean) * self.scale
        return (x @ self.components.T @ self.components) / self.scale + self.mean
