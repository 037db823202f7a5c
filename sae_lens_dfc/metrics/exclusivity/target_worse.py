"""Target worse: how often the other model predicts the text that follows worse where a latent
fires."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.stats.jackknife import Estimate, Jackknife, Sums

MIN_LOSS_RATIO = 1.25
"""Ratio of the target's loss to the source's above which the target predicts worse."""


@dataclass
class TargetWorse:
    """Measures the share of each latent's firings after which its target predicts worse than its
    source: its loss on the text that follows is more than 1.25 times the source's.

    That text is the same characters after the same characters for both models, the next eight pairs
    of the context, so the two losses are comparable whatever the tokenizers.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, d_a=1, d_b=1, n_a_exclusive=1))
    >>> crosscoder.W_dec.data = torch.tensor([[1.0, 0.0]])
    >>> measure = TargetWorse(crosscoder)
    >>> losses_of_a_and_b = torch.tensor([[1.0, 9.0], [1.0, 3.0], [2.0, 2.0]])
    >>> measure.update(torch.tensor([[0.0], [2.0], [2.0]]), losses_of_a_and_b)
    >>> measure.estimate().value.item()
    0.5
    """

    crosscoder: Crosscoder
    _share: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        is_a = owned_by_a(self.crosscoder)

        def share(sums: Sums) -> dict[str, Tensor]:
            n = sums["firings"].where(sums["firings"] > 0, torch.nan)
            return {"worse": torch.where(is_a, sums["b worse"], sums["a worse"]) / n}

        self._share = Jackknife(share)

    @torch.no_grad()
    def update(
        self, feature_acts: Float[Tensor, "batch d_sae"], following: Float[Tensor, "batch 2"]
    ) -> None:
        """Add a batch of latent activations, and both models' losses on the text after each row;
        rows of which a loss is NaN do not count."""
        known = ~following.isnan().any(dim=1)
        if not known.any():
            return
        fires = (feature_acts[known] > 0).double()
        a, b = following[known].to(fires).T
        worse = {"a worse": a > MIN_LOSS_RATIO * b, "b worse": b > MIN_LOSS_RATIO * a}
        counts = {name: fires.T @ rows.double() for name, rows in worse.items()}
        self._share.update(counts | {"firings": fires.sum(dim=0)})

    def estimate(self) -> Estimate:
        """The share of each latent's firings; NaN of one that does not fire.

        Its standard error is at least that of a share of as many independent firings, with two of
        each kind added to them (Agresti & Coull 1998): of few firings that are all alike, the
        blocks' own would be 0.

        Raises:
            ValueError: No loss is known.
        """
        share = self._share.estimates()["worse"]
        n = self._share.total["firings"]
        smoothed = (share.value * n + 2) / (n + 4)
        least = (smoothed * (1 - smoothed) / (n + 4)).sqrt()
        return share._replace(se=torch.maximum(share.se, least))
