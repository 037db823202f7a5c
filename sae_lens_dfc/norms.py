"""How long activations are: a median of the recent ones, and mean, spread and median of all."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Norms kept for the running median: its error is then about 1 %.
N_NORMS = 10_000
# Bins are a 256th of an octave wide: a median read off them is right to 0.14 %.
BINS_PER_OCTAVE = 256
LOWEST_OCTAVE, HIGHEST_OCTAVE = -24, 40


class RunningMedian:
    """Median of the last `N_NORMS` values."""

    def __init__(self, values: Float[Tensor, " n"] | None = None):
        self.values = torch.zeros(0) if values is None else values
        """The values remembered, oldest first."""

    def update(self, values: Float[Tensor, " n"]) -> None:
        """Remember these values, and forget the oldest."""
        self.values = torch.cat([self.values, values.float().cpu()])[-N_NORMS:]

    def compute(self) -> float:
        """The median; 0 of no values."""
        return float(self.values.median()) if len(self.values) > 0 else 0.0


def _no_bins() -> Tensor:
    return torch.zeros((HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE, dtype=torch.long)


@dataclass
class NormStatistics:
    """Mean, standard deviation and median of one model's norms, in one pass and constant memory.

    The histogram is from 6e-8 to 1.1e12; what lies beyond counts as at its end, so that a median of 6e-8 may be less.

    Mean and deviation by the updates of Welford (1962) and Chan et al. (1983), the median off a histogram.

    >>> statistics = NormStatistics()
    >>> statistics.update(torch.tensor([3.0, 5.0, 1.0]))
    >>> statistics.n, statistics.mean, round(statistics.median, 2)
    (3, 3.0, 3.0)
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    bins: Int[Tensor, " bins"] = field(default_factory=_no_bins)
    """Number of norms in each 256th of an octave."""

    def update(self, norms: Float[Tensor, " n"]) -> None:
        """Count norms in.

        Raises:
            ValueError: One is NaN or infinite.
        """
        norms = norms.double().cpu()
        if len(norms) == 0:
            return
        if not norms.isfinite().all():
            raise ValueError(
                "Activations are NaN, infinite, or so large (1e19 and above) that their norm is. Check the models' hooks and weights."
            )
        mean = float(norms.mean())
        octaves = norms.clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE
        index = (octaves * BINS_PER_OCTAVE).long().clamp(max=len(self.bins) - 1)
        bins = torch.bincount(index, minlength=len(self.bins))
        self.add(NormStatistics(len(norms), mean, float((norms - mean).pow(2).sum()), bins))

    def add(self, other: "NormStatistics") -> None:
        """Count another part's norms in."""
        n = self.n + other.n
        if n == 0:
            return
        difference = other.mean - self.mean
        self.mean += difference * other.n / n
        self.squares += other.squares + difference**2 * self.n * other.n / n
        self.n = n
        self.bins = self.bins + other.bins

    @property
    def std(self) -> float:
        """Standard deviation; 0 of fewer than two norms."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else 0.0

    @property
    def median(self) -> float:
        """Median, right to 0.14 %; 0 of no norms."""
        if self.n == 0:
            return 0.0
        middle = int(torch.searchsorted(self.bins.cumsum(0), (self.n + 1) // 2))
        return 2.0 ** (LOWEST_OCTAVE + (middle + 0.5) / BINS_PER_OCTAVE)

    def state(self) -> Float[Tensor, " values"]:
        """Everything as one tensor of float64, exact up to 2^53 norms."""
        scalars = torch.tensor([self.n, self.mean, self.squares], dtype=torch.double)
        return torch.cat([scalars, self.bins.double()])

    @classmethod
    def of(cls, state: Tensor) -> "NormStatistics":
        """The statistics back from `state`.

        Raises:
            ValueError: It is something else.
        """
        if state.shape != (3 + len(_no_bins()),) or not state.isfinite().all():
            raise ValueError(
                f"Statistics of norms cannot be of shape {tuple(state.shape)}, or not finite."
            )
        n, mean, squares = state[:3].tolist()
        return cls(int(n), mean, squares, state[3:].long())
