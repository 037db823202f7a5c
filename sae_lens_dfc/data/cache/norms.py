"""Computes the mean and standard deviation of activation norms in one pass."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class NormStatistics:
    """Mean and standard deviation of one model's norms, in one pass and constant memory.

    By the updates of Welford (1962) and Chan et al. (1983).

    >>> statistics = NormStatistics()
    >>> statistics.update(torch.tensor([3.0, 5.0, 1.0]))
    >>> statistics.n, statistics.mean, statistics.std
    (3, 3.0, 2.0)
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def update(self, norms: Float[Tensor, " n"]) -> None:
        """Add norms.

        Raises:
            ValueError: A norm is NaN or infinite.
        """
        norms = norms.double().cpu()
        if len(norms) == 0:
            return
        if not norms.isfinite().all():
            raise ValueError(
                "Activations are NaN, infinite, or so large (1e19 and above) that their norm is. Check the models' hooks and weights."
            )
        mean = float(norms.mean())
        self.add(NormStatistics(len(norms), mean, float((norms - mean).pow(2).sum())))

    def add(self, other: "NormStatistics") -> None:
        """Add the statistics of other norms."""
        n = self.n + other.n
        if n == 0:
            return
        difference = other.mean - self.mean
        self.mean += difference * other.n / n
        self.squares += other.squares + difference**2 * self.n * other.n / n
        self.n = n

    @property
    def std(self) -> float:
        """Standard deviation; 0 for fewer than two norms."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else 0.0

    def state(self) -> Float[Tensor, " values"]:
        """Everything as one tensor of float64, exact up to 2^53 norms."""
        return torch.tensor([self.n, self.mean, self.squares], dtype=torch.double)

    @classmethod
    def of(cls, state: Tensor) -> "NormStatistics":
        """Restore the statistics from `state`.

        Raises:
            ValueError: The tensor has another shape or is not finite.
        """
        if state.shape != (3,) or not state.isfinite().all():
            raise ValueError(
                f"Statistics of norms have a wrong shape, {tuple(state.shape)}, or are not finite."
            )
        n, mean, squares = state.tolist()
        return cls(int(n), mean, squares)
