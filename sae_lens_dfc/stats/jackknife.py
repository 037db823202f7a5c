"""Estimates standard errors of metrics by a jackknife over blocks of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Sums = Mapping[str, Tensor]
"""Sums over batches from which a metric is computed, by name."""
N_BLOCKS = 10
SE = "/se"
"""Suffix of the name of a metric's standard error."""
ROUNDING = 1e-13
"""Share of a sum of squares below which the squared deviations may be rounding error alone: values
are float32, whose squared rounding error is 4e-15 of their square."""


class Estimate(NamedTuple):
    """A metric with its standard error, for one item or many."""

    value: Float[Tensor, "*shape"]
    se: Float[Tensor, "*shape"]
    """Standard error; NaN if unknown."""
    degrees: int
    """Degrees of freedom of the standard error."""


def variation(
    n: Float[Tensor, ""] | int, x: Float[Tensor, "*shape"], xx: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Sum of squared deviations from the mean, from float64 sums of values and of their squares; 0
    where it is only rounding error.

    >>> variation(3, torch.tensor([6.0, 6.0]), torch.tensor([14.0, 12.0]))
    tensor([2., 0.])
    """
    squares = xx - x.pow(2) / n
    return squares.where(~(squares <= ROUNDING * xx), 0.0)


@dataclass
class Jackknife:
    """A statistic of sums over any number of batches, with its standard error.

    Batches are assigned to 10 blocks in turn; the standard error is that of the delete-one-block
    jackknife, `sqrt((g - 1) / g sum_i (t_i - mean t)^2)` with `t_i` the statistic of all blocks but
    the i-th of `g` (Efron & Tibshirani 1993, equation 11.5). It covers the sampling of the text,
    not the variation between training runs. Batches should hold whole contexts, because neighboring
    tokens are not independent.

    >>> import torch
    >>> mean = Jackknife(lambda sums: {"mean": (sums["x"] / sums["n"]).item()})
    >>> for x in (1.0, 2.0, 3.0):
    ...     mean.update({"x": torch.tensor(x), "n": torch.tensor(1.0)})
    >>> {name: round(value, 3) for name, value in mean.compute().items()}
    {'mean': 2.0, 'mean/se': 0.577}
    """

    statistic: Callable[[Sums], Mapping[str, float | Tensor]]
    """Computes the metrics from sums over batches."""
    _blocks: list[dict[str, Tensor]] = field(default_factory=list)
    _n_batches: int = 0

    def update(self, sums: Sums) -> None:
        """Add the sums of a batch."""
        i, self._n_batches = self._n_batches % N_BLOCKS, self._n_batches + 1
        if i == len(self._blocks):
            self._blocks.append(dict(sums))
        else:
            self._blocks[i] = {name: x + sums[name] for name, x in self._blocks[i].items()}

    @property
    def total(self) -> dict[str, Tensor]:
        """Sums over all batches; empty before the first batch."""
        first, *others = self._blocks or [{}]
        return {name: sum((block[name] for block in others), x) for name, x in first.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Each metric with its standard error, which is NaN if there is only one block.

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
            # torch warns of a variance over no values.
            if without and value.numel() > 0:
                others = torch.stack([_tensor(statistics[name]) for statistics in without])
                se = ((g - 1) * others.var(dim=0, unbiased=False)).sqrt()
            result[name] = Estimate(value, se, g - 1)
        return result

    def compute(self) -> dict[str, float]:
        """Each metric, and its standard error under its name with `/se` if there are at least two
        blocks.

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


def added(sums: Sums, more: Sums) -> dict[str, Tensor]:
    """The sums of two parts of a batch together.

    >>> added({}, {"n": torch.tensor(1)}) == added({"n": torch.tensor(0)}, {"n": torch.tensor(1)})
    True
    """
    return {name: x + sums[name] if name in sums else x for name, x in more.items()}


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of independent values, and its standard error under its name with `/se` if there are
    at least two.

    The standard error is `s / sqrt(n)`, with `s` the sample standard deviation (divided by n - 1).
    Both are NaN if any value is.

    Raises:
        ValueError: There is no value.

    >>> mean_and_error("score", [1.0, 3.0])
    {'score': 2.0, 'score/se': 1.0}
    """
    if not values:
        raise ValueError(f"There is no value of {name}, so it has no mean.")
    # The functions of the `statistics` module do not support NaN.
    x = torch.tensor(values, dtype=torch.double)
    if len(x) < 2:
        return {name: x.item()}
    return {name: x.mean().item(), name + SE: x.std().item() / math.sqrt(len(x))}
