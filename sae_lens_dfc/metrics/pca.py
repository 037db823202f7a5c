"""Principal components of both models together: what a linear code of the same width would explain."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.crosscoders.partition import Partition


@dataclass(frozen=True)
class JointPCA:
    """The leading principal components of the two models' joined, normalised activations."""

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]
    components: Float[Tensor, "k d_in"]

    @classmethod
    def fit(
        cls, acts: Iterable[Float[Tensor, "_ d_in"]], partition: Partition, k: int
    ) -> "JointPCA":
        """Components of raw activations, each model first scaled to the same total variance.

        Args:
            acts: Batches of raw activations.
            partition: Says which columns are whose.
            k: Number of components.
        """
        n, total, outer = 0, 0.0, 0.0
        origin: Tensor | None = None
        for batch in tqdm(acts, "Principal components", leave=False):
            if len(batch) == 0:
                continue
            x = batch.double()
            origin = x.mean(dim=0) if origin is None else origin
            x = x - origin
            n, total, outer = n + len(x), total + x.sum(dim=0), outer + x.T @ x
        if origin is None or not isinstance(total, Tensor) or not isinstance(outer, Tensor):
            raise ValueError("No activations to fit principal components on. Give more text.")
        centre = total / n
        covariance = outer / n - torch.outer(centre, centre)
        scale = torch.ones_like(centre)
        for inputs in partition.models.values():
            scale[inputs] = covariance.diagonal()[inputs].sum().rsqrt()
        _, vectors = torch.linalg.eigh(covariance * scale[:, None] * scale)
        return cls((origin + centre).float(), scale.float(), vectors[:, -k:].T.float())

    def reconstruct(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Raw activations rebuilt from the components alone."""
        x = (acts - self.mean) * self.scale
        return (x @ self.components.T @ self.components) / self.scale + self.mean
