"""The transfer test: AUROC with which the other model's activations predict when a latent fires."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.jackknife import variation

BINS_PER_STD = 8
LOWEST, HIGHEST = -6, 14
"""Range of the histograms, in standard deviations of a score; values beyond fall into the end
bins."""
SCORE_BINS = BINS_PER_STD * (HIGHEST - LOWEST)
MIN_FOR_SCALE = 256
"""Number of pairs used to place the bins; values are buffered until then."""
SMALLEST_FLOAT = torch.finfo(torch.float).tiny
MAX_NUMBERS = 2**26
"""Maximum number of pairs times latents processed at a time."""


@dataclass
class Transfer:
    """Measures how well each latent's firing in its source is predicted from its target's
    activations.

    A latent's *score* is its encoder's source block applied to the source's activations. The latent
    *fires* on the highest scores, on the same share of pairs as the whole latent. The prediction is
    the same block applied to the source's activations as predicted by the affine map, so it is a
    linear function of the target's activations. Shared and exclusive latents are thus predicted in
    the same way, from one model's activations, and can be compared. (For an exclusive latent this
    firing equals the latent's own, up to the width of a bin.)

    `auc` is the AUROC: the probability that a pair on which the latent fires has a higher
    prediction than one on which it does not, from a histogram of 1/8 standard deviation; 1/2 is
    chance. `r2` is the squared correlation of the score, where the latent fires, with the
    prediction's positive part; 0 if either is constant.

    It needs two passes over the batches: first all with `calibrate`, then all with `update`.

    Args:
        crosscoder: The saved crosscoder.
        affine_maps: Affine maps between the two models, fitted on other pairs.
    """

    crosscoder: Crosscoder
    affine_maps: AffineMaps
    _scores: "_Histogram" = field(init=False)
    _guesses: "_Histogram" = field(init=False)
    _firings: Tensor | None = None
    _thresholds: Tensor | None = None
    _sums: dict[str, Float[Tensor, " d_sae"]] = field(default_factory=dict)
    _n: int = 0

    def __post_init__(self) -> None:
        self._scores, self._guesses = _Histogram(), _Histogram()

    @torch.no_grad()
    def calibrate(
        self, acts: Float[Tensor, "batch d_in"], feature_acts: Float[Tensor, "batch d_sae"]
    ) -> None:
        """Add a batch of raw activations and their latent activations, to set each latent's
        threshold."""
        if len(acts) == 0:
            return
        fired = (feature_acts > 0).sum(dim=0)
        self._firings = fired if self._firings is None else self._firings + fired
        for part in self._parts(acts):
            score = self._score(*self._split(part))
            self._scores.add(score, torch.zeros_like(score, dtype=torch.bool))

    @torch.no_grad()
    def update(self, acts: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch of raw activations.

        Raises:
            ValueError: `calibrate` was not called.
        """
        if len(acts) == 0:
            return
        if self._firings is None:
            raise ValueError("Transfer needs to be calibrated on the same batches first.")
        if self._thresholds is None:
            self._thresholds = self._scores.upper_tail(self._firings)
        for part in self._parts(acts):
            a, b = self._split(part)
            self._count(
                self._score(a, b), self._score(self.affine_maps.to_a(b), self.affine_maps.to_b(a))
            )

    def _count(self, score: Tensor, guess: Tensor) -> None:
        assert self._thresholds is not None
        fires = score > self._thresholds
        self._guesses.add(guess, fires)
        self._n += len(score)
        x, y = (score * fires).double(), guess.clamp(min=0).double()
        sums = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "firings": fires.double()}
        for name, values in sums.items():
            self._sums[name] = values.sum(dim=0) + self._sums.get(name, 0)

    def _parts(self, acts: Tensor) -> Sequence[Tensor]:
        return acts.split(max(MIN_FOR_SCALE, MAX_NUMBERS // self.crosscoder.cfg.d_sae))

    def _split(self, acts: Tensor) -> tuple[Tensor, Tensor]:
        models = self.crosscoder.partition.models
        return acts[:, models["a"]], acts[:, models["b"]]

    def _score(self, a: Tensor, b: Tensor) -> Float[Tensor, "batch d_sae"]:
        """Each latent's encoder on its source's activations alone, minus the bias."""
        crosscoder = self.crosscoder
        models = crosscoder.partition.models.values()
        b_dec, W_enc = crosscoder.b_dec.float(), crosscoder.W_enc.float()
        of_a, of_b = ((x - b_dec[m]) @ W_enc[m] for x, m in zip((a, b), models, strict=True))
        return torch.where(owned_by_a(crosscoder), of_a, of_b)

    def compute(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """`auc`, `r2` and `firings` of each latent; the first two are NaN if it never or always
        fires.

        Raises:
            ValueError: No batch was added.
        """
        silent, fires = self._guesses.counts
        s, n = self._sums, self._n
        covariance = s["xy"] - s["x"] * s["y"] / n
        variances = variation(n, s["x"], s["xx"]) * variation(n, s["y"], s["yy"])
        r2 = torch.where(variances > 0, covariance.pow(2) / variances, 0)
        known = (s["firings"] > 0) & (s["firings"] < n)
        return {
            "auc": auroc_from_histograms(silent, fires).float(),
            "r2": torch.where(known, r2, torch.nan).float(),
            "firings": s["firings"],
        }


@dataclass
class _Histogram:
    """Histograms of each latent's values in bins of 1/8 standard deviation, for pairs on which it
    is silent and fires."""

    _counts: Int[Tensor, "2 d_sae bins"] | None = None
    _scale: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation of the first values; a rough estimate suffices for the bins."""
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, values: Float[Tensor, "n d_sae"], fires: Bool[Tensor, "n d_sae"]) -> None:
        self._waiting.append((values, fires))
        if self._scale is not None or sum(len(v) for v, _ in self._waiting) >= MIN_FOR_SCALE:
            self._count()

    def _count(self) -> None:
        values, fires = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        if self._scale is None:
            # In float64: the squares of large values overflow float32.
            std = values.double().std(dim=0, unbiased=False).to(values).clamp(min=SMALLEST_FLOAT)
            self._scale = values.mean(dim=0), std
        mean, std = self._scale
        bins = ((values - mean) / std - LOWEST) * BINS_PER_STD
        if bins.isnan().any():
            raise ValueError(
                "A latent's score is NaN or infinite. Leave out rows that are not finite or huge."
            )
        bins = bins.clamp(0, SCORE_BINS - 1).long()
        bins += SCORE_BINS * torch.arange(values.shape[1], device=values.device)
        size = SCORE_BINS * values.shape[1]
        counted = [torch.bincount(bins[chosen], minlength=size) for chosen in (~fires, fires)]
        counts = torch.stack(counted).view(2, -1, SCORE_BINS)
        self._counts = counts if self._counts is None else self._counts + counts

    @property
    def counts(self) -> Int[Tensor, "2 d_sae bins"]:
        if self._waiting:
            self._count()
        if self._counts is None:
            raise ValueError("No pair was evaluated, so no latent can be tested. Give more text.")
        return self._counts

    def upper_tail(self, n: Int[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """The lower edge of the bins that hold, as nearly as possible, the largest `n` values of
        each latent."""
        above = self.counts.sum(dim=0).flip(1).cumsum(dim=1).flip(1)  # values in this bin or higher
        above = torch.cat([above, torch.zeros_like(above[:, :1])], dim=1)
        edge = (above - n[:, None]).abs().argmin(dim=1)
        assert self._scale is not None  # values were counted
        mean, std = self._scale
        # A latent that never fires gets an infinite threshold.
        return torch.where(n > 0, mean + std * (edge / BINS_PER_STD + LOWEST), torch.inf)


def auroc_from_histograms(
    silent: Int[Tensor, "*latents bins"], fires: Int[Tensor, "*latents bins"]
) -> Float[Tensor, "*latents"]:
    """Area under the ROC curve from two histograms over the same bins, ties counting half; NaN if
    one is empty.

    >>> auroc_from_histograms(torch.tensor([2, 0, 0]), torch.tensor([0, 1, 1])), auroc_from_histograms(torch.tensor([1, 1]), torch.tensor([1, 1]))
    (tensor(1., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    silent, fires = silent.double(), fires.double()
    below = silent.cumsum(dim=-1) - silent / 2
    return (fires * below).sum(dim=-1) / (fires.sum(dim=-1) * silent.sum(dim=-1))
