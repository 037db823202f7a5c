"""The spread of a measure over stretches of the text it was measured on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Sums = Mapping[str, Tensor]
"""What a measure adds up over batches, by name."""
N_BLOCKS = 10
SE = "/se"
"""Ends the name under which a measure's standard error stands."""
ROUNDING = 1e-13
"""Share of a sum of squares below which its deviation from the mean may be rounding alone: values are of float32, whose own
rounding is 4e-15 of their square."""


class Estimate(NamedTuple):
    """A measure, of one thing or of many."""

    value: Float[Tensor, "*shape"]
    se: Float[Tensor, "*shape"]
    """Its standard error; NaN where nothing is known of it."""
    degrees: int
    """Degrees of freedom of the standard error."""


def variation(
    n: Float[Tensor, ""] | int, x: Float[Tensor, "*shape"], xx: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Sum of squared deviations from the mean, from sums in float64 of values and of their squares; 0 where it is rounding.

    >>> variation(3, torch.tensor([6.0, 6.0]), torch.tensor([14.0, 12.0]))
    tensor([2., 0.])
    """
    squares = xx - x.pow(2) / n
    return squares.where(~(squares <= ROUNDING * xx), 0.0)


@dataclass
class Jackknife:
    """A statistic of sums over any number of batches, with its standard error.

    Batches go to 10 blocks in turn; the standard error is that of the delete-one-block jackknife, `sqrt((g - 1) / g
    sum_i (t_i - mean t)^2)` with `t_i` the statistic of all blocks but the i-th of `g` (Efron & Tibshirani 1993, equation
    11.5). It is the error of having read this text and not another; what another training would have given is not in it.
    Batches of whole contexts should be given, since neighbours in a text are not independent.

    >>> import torch
    >>> mean = Jackknife(lambda sums: {"mean": (sums["x"] / sums["n"]).item()})
    >>> for x in (1.0, 2.0, 3.0):
    ...     mean.update({"x": torch.tensor(x), "n": torch.tensor(1.0)})
    >>> {name: round(value, 3) for name, value in mean.compute().items()}
    {'mean': 2.0, 'mean/se': 0.577}
    """

    statistic: Callable[[Sums], Mapping[str, float | Tensor]]
    """The measures, from sums over all batches."""
    _blocks: list[dict[str, Tensor]] = field(default_factory=list)
    _n_batches: int = 0

    def update(self, sums: Sums) -> None:
        """Count the sums of a batch in."""
        i, self._n_batches = self._n_batches % N_BLOCKS, self._n_batches + 1
        if i == len(self._blocks):
            self._blocks.append(dict(sums))
        else:
            self._blocks[i] = {name: x + sums[name] for name, x in self._blocks[i].items()}

    @property
    def total(self) -> dict[str, Tensor]:
        """Sums over all batches; empty before the first."""
        first, *others = self._blocks or [{}]
        return {name: sum((block[name] for block in others), x) for name, x in first.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Each measure with its standard error, which is NaN where there is one block only.

        Raises:
            ValueError: No batch was counted.
        """
        if not self._blocks:
            raise ValueError("No pair was evaluated, so there is no measure. Give more text.")
        total, g = self.total, len(self._blocks)
        values = {name: _tensor(x) for name, x in self.statistic(total).items()}
        without = [
            self.statistic({name: x - block[name] for name, x in total.items()})
            for block in self._blocks
            if g > 1
        ]
        result: dict[str, Estimate] = {}
        for name, value in values.items():
            se = torch.full_like(value, torch.nan)
            if without:
                others = torch.stack([_tensor(statistics[name]) for statistics in without])
                se = ((g - 1) * others.var(dim=0, unbiased=False)).sqrt()
            result[name] = Estimate(value, se, g - 1)
        return result

    def compute(self) -> dict[str, float]:
        """Each measure, and under its name with `/se` its standard error where there are two blocks or more.

        Raises:
            ValueError: No batch was counted.
        """
        result: dict[str, float] = {}
        for name, estimate in self.estimates().items():
            result[name] = estimate.value.item()
            if estimate.degrees > 0:
                result[name + SE] = estimate.se.item()
        return result


def _tensor(x: float | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.double)


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of independent values, and under its name with `/se` its standard error where there are two or more.

    `s / sqrt(n)`, with `s` the standard deviation of a sample (divided by n - 1). NaN where one of them is.

    Raises:
        ValueError: There is no value.

    >>> mean_and_error("score", [1.0, 3.0])
    {'score': 2.0, 'score/se': 1.0}
    """
    if not values:
        raise ValueError(f"There is no value of {name}, so it has no mean.")
    # Not those of `statistics`, which have no word for NaN.
    x = torch.tensor(values, dtype=torch.double)
    if len(x) < 2:
        return {name: x.item()}
    return {name: x.mean().item(), name + SE: x.std().item() / math.sqrt(len(x))}
