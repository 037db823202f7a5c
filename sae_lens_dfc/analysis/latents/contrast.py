"""Contrasts latents between two corpora: Cohen's d and AUROC of their maximum activation per
context."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.latents.streaming_topk import StreamingTopK

N_SAMPLED = 128
"""Number of contexts sampled for the AUROC, among those in which a latent fires."""
LATENTS_AT_ONCE = 4096


@dataclass
class ContextMaxima:
    """Accumulates each latent's maximum activation per context of one corpus, over any number of
    batches.

    The unit is a context, not a document: contexts have one size, whereas the maximum over a
    document grows with its length.

    Memory is constant, 28 + 12 * 128 bytes per latent: exact sums for the mean and variance; the
    exact number of contexts in which the latent fires; and a uniform sample of 128 of their maxima
    (`StreamingTopK` with random keys).

    Args:
        d_sae: Number of latents.
        seed: Seed of the sample.
        n_sampled: Size of the sample.
        device: Device that stores the statistics.
    """

    d_sae: int
    seed: int = 0
    n_sampled: int = N_SAMPLED
    device: torch.device | str = "cpu"
    n: int = 0
    """Number of contexts so far."""
    _sums: Float[Tensor, "2 d_sae"] = field(init=False)
    _firings: Int[Tensor, " d_sae"] = field(init=False)
    _sample: StreamingTopK = field(init=False)
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._sums = torch.zeros(2, self.d_sae, dtype=torch.double, device=self.device)
        self._firings = torch.zeros(self.d_sae, dtype=torch.long, device=self.device)
        formats = {"maximum": torch.float}
        self._sample = StreamingTopK(self.d_sae, self.n_sampled, formats, self.device)
        self._generator = torch.Generator().manual_seed(self.seed)

    @torch.no_grad()
    def update(
        self, feature_acts: Float[Tensor, "batch d_sae"], context: Int[Tensor, " batch"]
    ) -> None:
        """Add a batch of whole contexts.

        Args:
            feature_acts: Activations of the latents.
            context: The number of each row's context.

        Raises:
            ValueError: The activations contain NaN or infinity, which would count as not firing.
        """
        if len(feature_acts) == 0:
            return
        acts = feature_acts.to(self.device).float()
        if not acts.isfinite().all():
            raise ValueError(
                "Activations of latents are NaN or infinite. Remove rows whose activations are not finite or extremely large."
            )
        numbers, index = context.to(self.device).unique(return_inverse=True)
        maxima = acts.new_zeros(len(numbers), self.d_sae)
        maxima = maxima.scatter_reduce(0, index[:, None].expand_as(acts), acts, "amax")
        self.n += len(numbers)
        # float64, so that a spread of 1e-7 of the mean is distinguishable from rounding.
        self._sums[0] += maxima.sum(dim=0, dtype=torch.double)
        self._sums[1] += maxima.double().pow(2).sum(dim=0)
        self._firings += (maxima > 0).sum(dim=0)
        row, latent = (maxima > 0).nonzero(as_tuple=True)
        keys = torch.rand(len(row), generator=self._generator, dtype=torch.double)
        self._sample.update(latent, keys, {"maximum": maxima[row, latent]})

    def moments(self) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Mean and variance (divided by `n - 1`) over the contexts.

        Raises:
            ValueError: There are fewer than two contexts.
        """
        if self.n < 2:
            raise ValueError(
                f"Each of the compared corpora needs at least two contexts, got {self.n}. Give more text."
            )
        mean = self._sums[0] / self.n
        return mean, (self._sums[1] - self.n * mean.pow(2)).clamp(min=0) / (self.n - 1)

    def firing_shares(self) -> Float[Tensor, " d_sae"]:
        """Share of the contexts in which each latent fires."""
        return self._firings.double() / self.n

    def sorted_sample(self, latents: slice) -> Float[Tensor, "_ n_sampled"]:
        """Sampled maxima of these latents, ascending; empty slots are infinity."""
        maxima = self._sample.values["maximum"][latents]
        return maxima.where(self._sample.is_filled[latents], torch.inf).sort(dim=1).values


class Contrast(NamedTuple):
    """Contrast of each latent between two corpora; d > 0 and AUROC > 1/2 mean stronger in the
    first."""

    cohens_d: Float[Tensor, " d_sae"]
    auroc: Float[Tensor, " d_sae"]

    @property
    def order(self) -> Int[Tensor, " d_sae"]:
        """The latents sorted by AUROC, largest first; ties, such as perfect separation, are broken
        by d."""
        by_d = self.cohens_d.argsort(descending=True, stable=True)
        return by_d[self.auroc[by_d].argsort(descending=True, stable=True)]


def contrast(one: ContextMaxima, other: ContextMaxima) -> Contrast:
    """Cohen's d and AUROC of the maximum activation per context, of one corpus against another.

    `d = (m_1 - m_2) / sqrt((s_1^2 + s_2^2) / 2)` with means and standard deviations over contexts,
    counting a context in which a latent does not fire as 0 (Cohen 1988, "Statistical power
    analysis", section 2.2). It is 0 if all values are equal, and infinite if the means differ and
    both standard deviations are 0.

    AUROC is the probability that a context of the first corpus has the larger maximum, counting
    ties as one half. With `p_1` and `p_2` the shares of contexts in which a latent fires, it is
    `p_1 (1 - p_2) + (1 - p_1)(1 - p_2) / 2 + p_1 p_2 U`, where `U`, the AUROC among contexts in
    which it fires, is estimated from the samples. It is exact for latents that fire in 128 contexts
    or fewer of each corpus, and unbiased for the others, with a standard error of at most 0.04 p_1
    p_2. (Histograms would need bins fitted to each latent: the maxima of a latent that always fires
    may be within a few percent of each other.)

    Raises:
        ValueError: A corpus has fewer than two contexts.

    >>> refusals, web = ContextMaxima(2), ContextMaxima(2)
    >>> refusals.update(torch.tensor([[0.0, 1.0], [4.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0, 1]))
    >>> web.update(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    >>> found = contrast(refusals, web)
    >>> found.auroc.tolist(), round(found.cohens_d[0].item(), 3)
    ([1.0, 0.25], 2.236)
    """
    (mean_1, variance_1), (mean_2, variance_2) = one.moments(), other.moments()
    difference = mean_1 - mean_2
    d = difference / ((variance_1 + variance_2) / 2).sqrt()
    p_1, p_2 = one.firing_shares(), other.firing_shares()
    starts = range(0, one.d_sae, LATENTS_AT_ONCE)
    among = torch.cat([_among_firing(one, other, slice(i, i + LATENTS_AT_ONCE)) for i in starts])
    auroc = p_1 * (1 - p_2) + (1 - p_1) * (1 - p_2) / 2 + p_1 * p_2 * among
    return Contrast(d.where(difference != 0, 0.0), auroc)


def _among_firing(
    one: ContextMaxima, other: ContextMaxima, latents: slice
) -> Float[Tensor, " latents"]:
    """AUROC of the sampled maxima; 0 if a corpus has none, since its weight is then 0."""
    x, y = one.sorted_sample(latents), other.sorted_sample(latents)
    n_x, n_y = (s.isfinite().sum(dim=1) for s in (x, y))
    below = torch.searchsorted(y, x, right=False) + torch.searchsorted(y, x, right=True)
    wins = (below.double() / 2).where(x.isfinite(), 0.0).sum(dim=1)
    return wins / (n_x * n_y).clamp(min=1)
