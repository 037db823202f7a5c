"""How well each model's activations are rebuilt."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import Partition


@dataclass
class ExplainedVariance:
    """Share of each model's variance that its reconstruction explains, over any number of batches.

    Also the median over dimensions: where one dimension holds half of the variance, as in Gemma,
    the total is mostly about that one.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=1)
    >>> metric = ExplainedVariance(partition)
    >>> metric.update(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> metric.compute()["explained_variance/a"], metric.compute()["explained_variance/b"]
    (1.0, 0.0)
    """

    partition: Partition
    _n: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def update(
        self, acts: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
    ) -> None:
        """Count a batch of raw activations and their reconstruction in."""
        if len(acts) == 0:
            return
        acts = acts.double()
        if self._n == 0:
            # Sums of squares around a fixed first guess: around 0 they cancel where the mean is most of the norm.
            self._sums = {name: torch.zeros_like(acts[0]) for name in ("x", "xx", "error")}
            self._sums["origin"] = acts.mean(dim=0)
        x = acts - self._sums["origin"]
        self._n += len(acts)
        self._sums["x"] += x.sum(dim=0)
        self._sums["xx"] += x.pow(2).sum(dim=0)
        self._sums["error"] += (acts - reconstruction).pow(2).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """`explained_variance/a`, `…/b`, and `explained_variance_median/a`, `…/b` over dimensions.

        Raises:
            ValueError: No batch was counted.
        """
        if self._n == 0:
            raise ValueError("No pair was evaluated, so no variance is known. Give more text.")
        variance = self._sums["xx"] - self._sums["x"].pow(2) / self._n
        result: dict[str, float] = {}
        for model, inputs in self.partition.models.items():
            error, total = self._sums["error"][inputs], variance[inputs]
            result[f"explained_variance/{model}"] = (1 - error.sum() / total.sum()).item()
            varies = total > 0
            result[f"explained_variance_median/{model}"] = (
                (1 - error[varies] / total[varies]).median().item()
            )
        return result
