"""The spread of a measure over stretches of the text it was measured on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from torch import Tensor

Sums = Mapping[str, Tensor]
"""What a measure adds up over batches, by name."""
N_BLOCKS = 10
SE = "/se"
"""Ends the name under which a measure's standard error stands."""


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

    statistic: Callable[[Sums], Mapping[str, float]]
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

    def compute(self) -> dict[str, float]:
        """Each measure, and under its name with `/se` its standard error where there are two blocks or more.

        Raises:
            ValueError: No batch was counted.
        """
        if not self._blocks:
            raise ValueError("No pair was evaluated, so there is no measure. Give more text.")
        total = self.total
        result = dict(self.statistic(total))
        g = len(self._blocks)
        if g < 2:
            return result
        without = [
            self.statistic({name: x - block[name] for name, x in total.items()})
            for block in self._blocks
        ]
        for name in list(result):
            values = [statistics[name] for statistics in without]
            mean = sum(values) / g
            squares = sum((value - mean) ** 2 for value in values)
            result[name + SE] = math.sqrt((g - 1) / g * squares)
        return result


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of independent values, and under its name with `/se` its standard error where there are two or more.

    `s / sqrt(n)`, with `s` the standard deviation of a sample (divided by n - 1).

    Raises:
        ValueError: There is no value.

    >>> mean_and_error("score", [1.0, 3.0])
    {'score': 2.0, 'score/se': 1.0}
    """
    if not values:
        raise ValueError(f"There is no value of {name}, so it has no mean.")
    mean = fmean(values)
    if len(values) < 2:
        return {name: mean}
    return {name: mean, name + SE: stdev(values) / math.sqrt(len(values))}
