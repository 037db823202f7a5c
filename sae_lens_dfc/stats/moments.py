"""Accumulates means and covariances of two models' concatenated activations over batches."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.stats.jackknife import Sums, variation


@dataclass
class PairMoments:
    """Mean and covariance of concatenated activations, within each model and between the two.

    >>> moments = PairMoments.of([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])])
    >>> moments.mean.tolist(), moments.covariance.tolist()
    ([2.0, 4.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    n: int = 0
    """Pairs counted so far."""
    _sums: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, acts: Iterable[Float[Tensor, "_ d_in"]]) -> "PairMoments":
        """The moments of batches of activations.

        Raises:
            ValueError: There are no activations.
        """
        moments = cls()
        for batch in acts:
            moments.update(batch)
        if moments.n == 0:
            raise ValueError("No activations to take moments of. Give more text.")
        return moments

    def update(self, acts: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch."""
        if len(acts) == 0:
            return
        acts = acts.double()
        if self.n == 0:
            # Shifted by the first batch's mean: unshifted sums of squares would cancel if the mean
            # is most of the norm.
            d = acts.shape[1]
            zeros = acts.new_zeros(d), acts.new_zeros(d, d)
            self._sums = dict(zip(("origin", "x", "xx"), (acts.mean(dim=0), *zeros), strict=True))
        x = acts - self._sums["origin"]
        self.n += len(x)
        self._sums["x"] += x.sum(dim=0)
        self._sums["xx"].addmm_(x.T, x)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        return self._sums["origin"] + self._sums["x"] / self.n

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """Covariance, divided by `n`, not `n - 1`."""
        center = self._sums["x"] / self.n
        return self._sums["xx"] / self.n - torch.outer(center, center)


def moments(x: Float[Tensor, "n d"], prefix: str = "") -> dict[str, Tensor]:
    """The sums over rows needed for variances: `n`, `x (d,)` and `xx (d,)`, each after a prefix."""
    n = torch.tensor(float(len(x)), dtype=x.dtype, device=x.device)
    return {f"{prefix}n": n, f"{prefix}x": x.sum(dim=0), f"{prefix}xx": x.pow(2).sum(dim=0)}


def squared_deviations(sums: Sums, prefix: str = "") -> Float[Tensor, " d"]:
    """Each dimension's sum of squared deviations from its mean, from sums of `moments` over
    batches.

    >>> squared_deviations(moments(torch.tensor([[1.0], [2.0], [3.0]])))
    tensor([2.])
    """
    return variation(*(sums[f"{prefix}{name}"] for name in ("n", "x", "xx")))
