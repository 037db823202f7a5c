"""Corrects p-values for multiple tests, and bootstraps intervals of effects."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control
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

        It is from a one-sided t-test, paired by text, against the mean of a kind's directions; 1
        with fewer than three texts, which are too few.
        """
        if len(self.values) < 3 or not self.controls:
            return 1.0
        return max(self._p(of_kind) for of_kind in self.controls.values())

    def _p(self, of_kind: Tensor) -> float:
        more = (self.values - of_kind.mean(dim=0)).double()
        if more.std() == 0:
            return 0.0 if more[0] > 0 else 1.0
        t = more.mean() / more.std() * len(more) ** 0.5
        return float(student.sf(t.item(), len(more) - 1))
