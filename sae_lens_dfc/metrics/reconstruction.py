"""Computes explained variance, MSE, cosine and norm ratio of each model's reconstruction."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.stats.jackknife import Jackknife, Sums
from sae_lens_dfc.stats.moments import moments, squared_deviations

SMALLEST_DOUBLE = torch.finfo(torch.double).tiny


@dataclass
class ExplainedVariance:
    """Explained variance of each model's reconstruction, over any number of batches.

    `1 - sum |x - reconstruction|^2 / sum |x - mean|^2`, summed over pairs and dimensions. Also its
    median over dimensions: if one dimension holds half of the variance, as in Gemma, the total
    mostly reflects that one.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=1)
    >>> metric = ExplainedVariance(partition)
    >>> metric.update(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> metric.compute()["explained_variance/a"], metric.compute()["explained_variance/b"]
    (1.0, 0.0)
    """

    partition: Partition
    _origin: Tensor | None = None
    _sums: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Jackknife(self._measures)

    def update(
        self, acts: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
    ) -> None:
        """Add a batch of raw activations and their reconstruction."""
        if len(acts) == 0:
            return
        acts = acts.double()
        if self._origin is None:
            # Sums of squares around a fixed estimate of the mean: around 0, they cancel if the mean
            # dominates the norm.
            self._origin = acts.mean(dim=0)
        error = (acts - reconstruction).pow(2).sum(dim=0)
        self._sums.update({**moments(acts - self._origin), "error": error})

    def compute(self) -> dict[str, float]:
        """`explained_variance/m` and, as median over dimensions, `explained_variance_median/m` of
        each model `m`, with standard errors, `/se`.

        Raises:
            ValueError: No batch was added.
        """
        return self._sums.compute()

    def _measures(self, sums: Sums) -> dict[str, float]:
        variance = squared_deviations(sums)
        result: dict[str, float] = {}
        for model, inputs in self.partition.models.items():
            error, total = sums["error"][inputs], variance[inputs]
            result[f"explained_variance/{model}"] = (1 - error.sum() / total.sum()).item()
            varies = total > 0
            result[f"explained_variance_median/{model}"] = (
                (1 - error[varies] / total[varies]).median().item()
            )
        return result


@dataclass
class ReconstructionByRow:
    """Error, direction and norm of each pair's reconstruction, averaged over pairs.

    - `mse/m`: squared L2 norm of the error, summed over the model's dimensions, in the normalized
      units of training (the raw error times the model's `input_scale`). In these units each model's
      total variance is `(d_a + d_b) / 2` by default, so values are comparable between models and
      with the training loss.
    - `cosine/m`: cosine of `reconstruction - center` and `x - center`, 0 if the reconstruction is
      the center itself.
    - `norm_ratio/m`: `|reconstruction - center| / |x - center|`; below 1 the reconstruction shrinks
      the activation.

    Without centering, the last two would be near 1 for any reconstruction: the mean is 94 % of the
    squared norm in Gemma.

    Args:
        partition: Which columns belong to which model.
        center: Approximate mean of the raw activations, given so that one pass is enough: from
            other text, or the crosscoder's `b_dec`.
        input_scale: The crosscoder's `input_scale`.

    >>> partition = Partition(d_a=1, d_b=2, n_a_exclusive=0, n_b_exclusive=0, n_shared=1)
    >>> metric = ReconstructionByRow(partition, center=torch.ones(3), input_scale=torch.tensor([10.0, 1.0]))
    >>> metric.update(torch.tensor([[3.0, 1.0, 5.0]]), torch.tensor([[2.0, 1.0, -1.0]]))
    >>> metric.compute()
    {'mse/a': 100.0, 'cosine/a': 1.0, 'norm_ratio/a': 0.5, 'mse/b': 36.0, 'cosine/b': -1.0, 'norm_ratio/b': 0.5}
    """

    partition: Partition
    center: Float[Tensor, " d_in"]
    input_scale: Float[Tensor, "2"]
    _sums: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Jackknife(
            lambda sums: {k: (x / sums["n"]).item() for k, x in sums.items() if k != "n"}
        )

    def update(
        self, acts: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
    ) -> None:
        """Add a batch of raw activations and their reconstruction."""
        if len(acts) == 0:
            return
        center = self.center.to(acts.device).double()
        x, y = acts.double() - center, reconstruction.double() - center
        sums = {"n": torch.tensor(float(len(acts)), dtype=torch.double, device=acts.device)}
        for scale, (model, where) in zip(
            self.input_scale.double().tolist(), self.partition.models.items(), strict=True
        ):
            x_m, y_m = x[:, where], y[:, where]
            sums[f"mse/{model}"] = (scale * (y_m - x_m)).pow(2).sum()
            sums[f"cosine/{model}"] = cosine_similarity(x_m, y_m, eps=SMALLEST_DOUBLE).sum()
            sums[f"norm_ratio/{model}"] = (y_m.norm(dim=-1) / x_m.norm(dim=-1)).sum()
        self._sums.update(sums)

    def compute(self) -> dict[str, float]:
        """`mse/m`, `cosine/m` and `norm_ratio/m` of each model; each with its `/se`.

        Raises:
            ValueError: No batch was added.
        """
        return self._sums.compute()
