"""Computes L0, firing rates and dead fractions of each partition."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import Partition


@dataclass
class ActivationStats:
    """Firing counts and activation statistics of all latents, over any number of batches.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=1, n_b_exclusive=0, n_shared=2)
    >>> metric = ActivationStats(partition)
    >>> metric.update(torch.tensor([[0.0, 2.0, 0.0], [0.0, 4.0, 1.0]]))
    >>> metric.compute()
    {'l0': 1.5, 'l0/a_exclusive': 0.0, 'firing_rate/a_exclusive': 0.0, 'dead_fraction/a_exclusive': 1.0, 'l0/shared': 1.5, 'firing_rate/shared': 0.75, 'dead_fraction/shared': 0.0}
    """

    partition: Partition
    n: int = 0
    counts: Float[Tensor, " d_sae"] = field(init=False)
    """Number of pairs on which each latent fired."""
    sums: Float[Tensor, " d_sae"] = field(init=False)
    """Sum of each latent's activations."""
    maxima: Float[Tensor, " d_sae"] = field(init=False)
    """Each latent's largest activation."""

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.partition.d_sae, dtype=torch.double)
        self.sums = torch.zeros(self.partition.d_sae, dtype=torch.double)
        self.maxima = torch.zeros(self.partition.d_sae)

    def update(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Add a batch.

        Raises:
            ValueError: It contains NaN or infinity, which would count as not firing.
        """
        if len(feature_acts) == 0:
            return
        sums = feature_acts.double().sum(dim=0).cpu()
        if not sums.isfinite().all():
            raise ValueError(
                f"{int((~sums.isfinite()).sum())} of {len(sums)} latents have activations that are NaN or infinite. Leave out "
                "rows that are not finite or huge, and see that the crosscoder is of these models."
            )
        self.n += len(feature_acts)
        self.counts += (feature_acts > 0).sum(dim=0).cpu()
        self.sums += sums
        self.maxima = torch.maximum(self.maxima, feature_acts.float().max(dim=0).values.cpu())

    @property
    def rates(self) -> Float[Tensor, " d_sae"]:
        """Fraction of the pairs on which each latent fired."""
        return self.counts / max(self.n, 1)

    @property
    def means(self) -> Float[Tensor, " d_sae"]:
        """Each latent's mean activation over the pairs on which it fires."""
        return self.sums / self.counts.clamp(min=1)

    def compute(self) -> dict[str, float]:
        """`l0`, and `l0/p`, `firing_rate/p` (mean over latents) and `dead_fraction/p` of each
        non-empty partition `p`."""
        result = {"l0": self.rates.sum().item()}
        for name, latents in self.partition.slices.items():
            if self.partition.sizes[name] > 0:
                result[f"l0/{name}"] = self.rates[latents].sum().item()
                result[f"firing_rate/{name}"] = self.rates[latents].mean().item()
                result[f"dead_fraction/{name}"] = (self.counts[latents] == 0).double().mean().item()
        return result
