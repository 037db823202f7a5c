"""An effect on several texts beside the same change made in other directions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from sae_lens_dfc.metrics.significance import QUANTILE

N_RESAMPLES = 2000


def interval(values: Float[Tensor, " n"], seed: int = 0) -> tuple[float, float]:
    """The mean's 95 % interval over texts, by bootstrap (percentiles of 2,000 resamples)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (N_RESAMPLES, len(values)), generator=generator)
    low, high = values[drawn].mean(dim=1).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def limit(means: Float[Tensor, " k"]) -> float:
    """The 95th percentile of the controls' means, above which an effect is none of theirs."""
    return means.quantile(QUANTILE).item()


@dataclass(frozen=True)
class Effect:
    """What a direction does to each text, and what control directions of the same length do to the same texts."""

    values: Float[Tensor, " n"]
    """Of each text."""
    controls: Mapping[str, Float[Tensor, "_ n"]]
    """By kind of control: of each direction and text."""

    @property
    def mean(self) -> float:
        """Over texts."""
        return self.values.mean().item()

    @property
    def limits(self) -> dict[str, float]:
        """The 95th percentile of each kind's means over texts."""
        return {kind: limit(of_kind.mean(dim=1)) for kind, of_kind in self.controls.items()}

    @property
    def is_beyond(self) -> bool:
        """Whether the mean is above the limit of every kind of control, of which there is one.

        >>> controls = {"random": torch.zeros(3, 2), "others": torch.full((3, 2), 0.5)}
        >>> Effect(torch.tensor([0.9, 0.7]), controls).is_beyond, Effect(torch.tensor([0.5, 0.3]), controls).is_beyond
        (True, False)
        """
        return bool(self.controls) and all(self.mean > limit for limit in self.limits.values())

    @property
    def p(self) -> float:
        """How likely so large an effect is where it is no larger than the controls': the largest of all kinds' p-values.

        A one-sided t-test, paired by text, against the mean of a kind's directions; 1 with fewer than three texts,
        which cannot tell.
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
