"""Measures how well an exported SAE's activations and reconstruction match the crosscoder's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.stats.jackknife import Jackknife, Sums
from sae_lens_dfc.stats.moments import moments, squared_deviations


@dataclass
class FeatureActsDifference:
    """Compares latent activations and reconstruction of an exported SAE with those of its
    crosscoder, over any number of batches.

    For each partition, over all its latents and rows:

    - `feature_acts_explained_variance/p`: `1 - sum (f - g)^2 / sum (f - mean f)^2`, with `f` the
      crosscoder's latent activations and `g` the SAE's;
    - `firing_precision/p`: share of the SAE's firings at which the crosscoder's latent fires too;
      `firing_recall/p` is the reverse, and `firing_recall_median/p` the median over latents that
      fire.

    Also `l0/crosscoder` and `l0/exported` over the kept latents, `explained_variance/crosscoder`
    and `explained_variance/exported` of the model's own activations, and the number of `rows`. Each
    metric has a standard error, `/se`, given two or more batches.

    Args:
        groups: Each partition's slice of the kept latents.
        center: Approximate mean of the model's activations, `(d_own,)`.

    >>> import torch
    >>> measured = FeatureActsDifference({"shared": slice(0, 1)}, center=torch.zeros(1))
    >>> f, g = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[0.0], [0.0], [4.0]])
    >>> measured.update(f, two=f, one=g, rebuilt_two=f, rebuilt_one=g)
    >>> found = measured.compute()
    >>> found["feature_acts_explained_variance/shared"], found["firing_precision/shared"], found["firing_recall/shared"]
    (0.5, 1.0, 0.5)
    """

    groups: Mapping[str, slice]
    center: Float[Tensor, " d_own"]
    _sums: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Jackknife(self._measures)

    def update(
        self,
        acts: Float[Tensor, "batch d_own"],
        two: Float[Tensor, "batch n_kept"],
        one: Float[Tensor, "batch n_kept"],
        rebuilt_two: Float[Tensor, "batch d_own"],
        rebuilt_one: Float[Tensor, "batch d_own"],
    ) -> None:
        """Add a batch: the model's raw activations, both codes, and both reconstructions.

        Raises:
            ValueError: A value is NaN or infinite, which would count as not firing.
        """
        if len(acts) == 0:
            return
        sums = moments((acts - self.center).double(), "acts/")
        sums |= moments(two.double(), "feature_acts/")
        sums["code_error"] = (two - one).double().pow(2).sum(dim=0)
        fires_two, fires_one = two > 0, one > 0
        sums["two"], sums["one"] = fires_two.sum(dim=0), fires_one.sum(dim=0)
        sums["both"] = (fires_two & fires_one).sum(dim=0)
        sums["error_two"] = (acts - rebuilt_two).double().pow(2).sum()
        sums["error_one"] = (acts - rebuilt_one).double().pow(2).sum()
        if not all(x.isfinite().all() for x in sums.values()):
            raise ValueError(
                "The rows to measure on, or their codes, hold NaN or infinity. Leave such rows out."
            )
        self._sums.update(sums)

    def compute(self) -> dict[str, float]:
        """The metrics; those of a partition in which no latent fires are left out.

        Raises:
            ValueError: No row was added.
        """
        measures = {n: x for n, x in self._sums.compute().items() if math.isfinite(x)}
        return {**measures, "rows": int(self._sums.total["acts/n"])}

    def _measures(self, sums: Sums) -> dict[str, float]:
        n = sums["acts/n"]
        total = squared_deviations(sums, "acts/").sum()
        deviations = squared_deviations(sums, "feature_acts/")
        result = {
            "l0/crosscoder": (sums["two"].sum() / n).item(),
            "l0/exported": (sums["one"].sum() / n).item(),
            "explained_variance/crosscoder": (1 - sums["error_two"] / total).item(),
            "explained_variance/exported": (1 - sums["error_one"] / total).item(),
        }
        for name, latents in self.groups.items():
            both, two, one = (sums[key][latents] for key in ("both", "two", "one"))
            explained = 1 - sums["code_error"][latents].sum() / deviations[latents].sum()
            result |= {
                f"feature_acts_explained_variance/{name}": explained.item(),
                f"firing_precision/{name}": (both.sum() / one.sum()).item(),
                f"firing_recall/{name}": (both.sum() / two.sum()).item(),
                f"firing_recall_median/{name}": (both / two).nanmedian().item(),
            }
        return result
