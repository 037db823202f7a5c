"""The transfer test: whether the other model's activations tell when a latent fires."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.scaling import owned_by_a
from sae_lens_dfc.metrics.stitching import Stitching

BINS_PER_STD = 8
LOWEST, HIGHEST = -6, 14
"""Standard deviations of a score that are told apart; what lies beyond is counted as there."""
N_BINS = BINS_PER_STD * (HIGHEST - LOWEST)


@dataclass
class Transfer:
    """How well each latent's firing in its source is predicted by what its target's activations say of the source.

    The latent is encoded from its source alone, the target's activations being replaced by the map's guess: that is what
    it should be. It is encoded from its target alone in the same way: that is the prediction, a linear function of the target's
    activations. So no activation is on both sides, for shared latents as for exclusive ones.

    `auc` is the chance that a pair on which the latent fires has a higher prediction than one on which it does not (ROC-AUC; on
    a histogram of 1/8 standard deviation), 1/2 when the target knows nothing of it. `r2` is the squared correlation of the
    activation with the prediction's positive part.

    Args:
        crosscoder: The saved crosscoder.
        stitching: The maps between the two models, not fitted on the pairs counted here.
    """

    crosscoder: Crosscoder
    stitching: Stitching
    _sums: dict[str, Float[Tensor, " d_sae"]] = field(default_factory=dict)
    _histogram: Int[Tensor, "2 d_sae_bins"] | None = None
    _n: int = 0
    _scale: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, acts: Float[Tensor, "batch d_in"]) -> None:
        """Count a batch of raw activations in."""
        if len(acts) == 0:
            return
        own, guess = self._source_and_guess(acts)
        fires = own > 0
        if self._scale is None or self._histogram is None:
            # From the first batch: bins need no more than a rough idea of where the scores are.
            self._scale = guess.mean(dim=0), guess.std(dim=0).clamp(min=1e-12)
            self._histogram = torch.zeros(2, N_BINS * guess.shape[1], dtype=torch.long).to(
                guess.device
            )
        mean, std = self._scale
        standardised = (guess - mean) / std
        bins = ((standardised - LOWEST) * BINS_PER_STD).clamp(0, N_BINS - 1).long()
        where = bins + N_BINS * torch.arange(guess.shape[1], device=bins.device)
        for i, chosen in enumerate((where[~fires], where[fires])):
            self._histogram[i] += torch.bincount(chosen, minlength=self._histogram.shape[1])
        self._n += len(acts)
        x, y = own.double(), guess.clamp(min=0).double()
        sums = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "firings": fires.double()}
        for name, values in sums.items():
            self._sums[name] = values.sum(dim=0) + self._sums.get(name, 0)

    def _source_and_guess(self, acts: Tensor) -> tuple[Tensor, Tensor]:
        models = self.crosscoder.partition.models
        a, b = acts[:, models["a"]], acts[:, models["b"]]
        from_a = self._pre(torch.cat([a, self.stitching.to_b(a)], dim=-1))
        from_b = self._pre(torch.cat([self.stitching.to_a(b), b], dim=-1))
        is_a = owned_by_a(self.crosscoder)
        own = torch.where(is_a, from_a, from_b)
        fires = (own > self.crosscoder.threshold) & (own > 0)
        return own * fires, torch.where(is_a, from_b, from_a)

    def _pre(self, acts: Tensor) -> Tensor:
        crosscoder = self.crosscoder
        return crosscoder.process_sae_in(acts) @ crosscoder.W_enc + crosscoder.b_enc

    def compute(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """`auc`, `r2` and `firings` of each latent; the first two NaN where it fires never or always.

        Raises:
            ValueError: No batch was counted.
        """
        if self._histogram is None:
            raise ValueError("No pair was evaluated, so no latent can be tested. Give more text.")
        s, n = self._sums, self._n
        covariance = s["xy"] - s["x"] * s["y"] / n
        variances = (s["xx"] - s["x"].pow(2) / n) * (s["yy"] - s["y"].pow(2) / n)
        silent, fires = self._histogram.view(2, -1, N_BINS)
        r2 = torch.where(variances > 0, covariance.pow(2) / variances, 0)
        known = (s["firings"] > 0) & (s["firings"] < n)
        return {
            "auc": auc(silent, fires).float(),
            "r2": torch.where(known, r2, torch.nan).float(),
            "firings": s["firings"],
        }


def auc(
    silent: Int[Tensor, "*latents bins"], fires: Int[Tensor, "*latents bins"]
) -> Float[Tensor, "*latents"]:
    """Area under the ROC curve from two histograms over the same bins, equal bins counting half; NaN where one is empty.

    >>> auc(torch.tensor([2, 0, 0]), torch.tensor([0, 1, 1])), auc(torch.tensor([1, 1]), torch.tensor([1, 1]))
    (tensor(1., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    silent, fires = silent.double(), fires.double()
    below = silent.cumsum(dim=-1) - silent / 2
    return (fires * below).sum(dim=-1) / (fires.sum(dim=-1) * silent.sum(dim=-1))
