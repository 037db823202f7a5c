"""Target worse: how often the other model predicts the text that follows worse where a latent
fires."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.stats.jackknife import Estimate, Jackknife, Sums

MIN_LOSS_RATIO = 1.25
"""Ratio of the target's loss to the source's above which the target predicts worse."""
MIN_CONTEXTS = 15
"""Minimum contexts in which a latent fires to know the standard error of its share."""
NAMES = ("next_worse", "target_worse")
"""The shares, by the window of text: up to the next pair, and up to the eighth."""


@dataclass
class TargetWorse:
    """Measures the share of each latent's firings after which its target predicts worse than its
    source: its loss on the text that follows is more than 1.25 times the source's.

    That text is the same characters after the same characters for both models, so the two losses
    are comparable whatever the tokenizers. It is taken twice: up to the next pair of the context,
    and up to the eighth.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, d_a=1, d_b=1, n_a_exclusive=1))
    >>> crosscoder.W_dec.data = torch.tensor([[1.0, 0.0]])
    >>> measure = TargetWorse(crosscoder)
    >>> losses_of_a_and_b = torch.tensor([[1.0, 9.0], [1.0, 3.0], [2.0, 2.0]])
    >>> measure.update(torch.tensor([[0.0], [2.0], [2.0]]), torch.stack([losses_of_a_and_b] * 2, dim=1))
    >>> {name: share.value.item() for name, share in measure.estimates().items()}
    {'next_worse': 0.5, 'target_worse': 0.5}
    """

    crosscoder: Crosscoder
    _share: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        is_a = owned_by_a(self.crosscoder)

        def share(sums: Sums) -> dict[str, Tensor]:
            n = sums["firings"].where(sums["firings"] > 0, torch.nan)
            return {
                name: torch.where(is_a, sums[f"b {name}"], sums[f"a {name}"]) / n for name in NAMES
            }

        self._share = Jackknife(share)

    @torch.no_grad()
    def update(
        self,
        feature_acts: Float[Tensor, "batch d_sae"],
        following: Float[Tensor, "batch windows 2"],
        context: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Add a batch of latent activations, and both models' losses on the text after each row;
        see `following_losses`. Rows of which a loss is NaN do not count.

        Args:
            feature_acts: Latent activations.
            following: Losses of A and B.
            context: Number of the context of each row; none takes the batch as one context.
        """
        known = ~following.isnan().flatten(start_dim=1).any(dim=1)
        if not known.any():
            return
        fires = (feature_acts[known] > 0).double()
        number = None if context is None else context[known].unique(return_inverse=True)[1]
        counts = {"firings": fires.sum(dim=0), "contexts": _contexts(fires, number)}
        for name, losses in zip(NAMES, following[known].to(fires).unbind(dim=1), strict=True):
            a, b = losses.T
            counts[f"a {name}"] = fires.T @ (a > MIN_LOSS_RATIO * b).double()
            counts[f"b {name}"] = fires.T @ (b > MIN_LOSS_RATIO * a).double()
        self._share.update(counts)

    def estimates(self) -> dict[str, Estimate]:
        """The shares of each latent's firings: `next_worse` on the text up to the next pair, and
        `target_worse` on that up to the eighth; NaN of a latent that does not fire.

        Firings that are all alike would have a standard error of 0. It is therefore at least that
        of as many equal observations as there are contexts, with two of each kind added (Agresti &
        Coull 1998). It is unknown (NaN) of a latent that fires in fewer than 15 contexts.

        Raises:
            ValueError: No loss is known.
        """
        n = self._share.total["contexts"]
        least = (2 * (n + 2) / (n + 4).pow(3)).sqrt().where(n >= MIN_CONTEXTS, torch.nan)
        return {
            name: share._replace(se=torch.maximum(share.se, least))
            for name, share in self._share.estimates().items()
        }


def _contexts(
    fires: Float[Tensor, "batch d_sae"], number: Int[Tensor, " batch"] | None
) -> Float[Tensor, " d_sae"]:
    """In how many of the numbered contexts each latent fires."""
    if number is None:
        return (fires.sum(dim=0) > 0).double()
    firings = fires.new_zeros(int(number.max()) + 1, fires.shape[1])
    return (firings.index_add(0, number.to(fires.device), fires) > 0).double().sum(dim=0)
