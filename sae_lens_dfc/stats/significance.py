"""Corrects p-values for multiple tests, and bootstraps intervals of effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control, spearmanr
from scipy.stats import t as student
from torch import Tensor

N_RESAMPLES = 2000

QUANTILE = 0.95


def benjamini_hochberg(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Adjusted p-values: the false discovery rate at which each test would just be significant
    (Benjamini & Hochberg 1995).

    >>> benjamini_hochberg(torch.tensor([0.01, 0.5, 0.02], dtype=torch.double)).tolist()
    [0.03, 0.5, 0.03]
    """
    if len(p) == 0:
        return p.double()
    return torch.from_numpy(false_discovery_control(p.double().cpu().numpy())).to(p.device)


def share_beyond(values: Float[Tensor, " n"], null: Float[Tensor, " m"]) -> float:
    """Share of the values above the null's 95th percentile; NaN if either is empty.

    >>> share_beyond(torch.tensor([1.0, 5.0]), torch.arange(3.0))
    0.5
    """
    values, null = (x[~x.isnan()].double() for x in (values, null))
    if len(values) == 0 or len(null) == 0:
        return float("nan")
    return (values > torch.quantile(null, QUANTILE)).double().mean().item()


def interval(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over texts (percentiles of 2,000 resamples)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (N_RESAMPLES, len(values)), generator=generator)
    low, high = values[drawn].mean(dim=1).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def p_positive(values: Float[Tensor, " n"]) -> float:
    """The p-value of the hypothesis that the mean over texts is 0 or less (one-sided t-test); 1 with
    fewer than three texts, which are too few.

    >>> round(p_positive(torch.tensor([1.0, 2.0, 3.0])), 3)
    0.037
    """
    if len(values) < 3:
        return 1.0
    values = values.double()
    if values.std() == 0:
        return 0.0 if values[0] > 0 else 1.0
    t = values.mean() / values.std() * len(values) ** 0.5
    return float(student.sf(t.item(), len(values) - 1))


def rank_correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> tuple[float, float]:
    """Spearman's correlation over texts, and the p-value of the hypothesis that it is not positive; 0
    and 1 if one of the two does not vary.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([0.0, 5.0, 6.0, 7.0]))[0]
    1.0
    """
    if x.std() == 0 or y.std() == 0:
        return 0.0, 1.0
    found: Any = spearmanr(x.numpy(), y.numpy(), alternative="greater")
    return float(found.statistic), float(found.pvalue)


def limit(means: Float[Tensor, " k"]) -> float:
    """The 95th percentile of the controls' means, which an effect must exceed."""
    return means.quantile(QUANTILE).item()


@dataclass(frozen=True)
class Effect:
    """Effect of a direction on each text, and of control directions of the same norm on the same
    texts."""

    values: Float[Tensor, " n"]
    """Effect on each text."""
    controls: Mapping[str, Float[Tensor, "_ n"]]
    """Effects of control directions on each text, by kind of control."""

    @property
    def mean(self) -> float:
        """Mean over texts."""
        return self.values.mean().item()

    @property
    def limits(self) -> dict[str, float]:
        """The 95th percentile of the means over texts, for each kind of control."""
        return {kind: limit(of_kind.mean(dim=1)) for kind, of_kind in self.controls.items()}

    @property
    def is_beyond(self) -> bool:
        """Whether the mean exceeds the limit of every kind of control; false without controls.

        >>> controls = {"random": torch.zeros(3, 2), "others": torch.full((3, 2), 0.5)}
        >>> Effect(torch.tensor([0.9, 0.7]), controls).is_beyond, Effect(torch.tensor([0.5, 0.3]), controls).is_beyond
        (True, False)
        """
        return bool(self.controls) and all(self.mean > limit for limit in self.limits.values())

    @property
    def p(self) -> float:
        """p-value against the null hypothesis that the effect is no larger than the controls': the
        largest over the kinds of control.

        It is that of `p_positive` for the differences from the mean of a kind's directions.
        """
        if not self.controls:
            return 1.0
        return max(p_positive(self.values - own.mean(dim=0)) for own in self.controls.values())
