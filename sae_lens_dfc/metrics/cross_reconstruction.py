"""Cross-reconstruction: reconstructs one model's activations when only the other model is
encoded."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.groups import EXCLUSIVE_TO
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.jackknife import Jackknife, Sums
from sae_lens_dfc.stats.moments import moments, squared_deviations

Map = Callable[[Float[Tensor, "n d_from"]], Float[Tensor, "n d_to"]]
"""Predicts the other model's raw activations from one model's."""


@torch.no_grad()
def reconstructed_from(
    crosscoder: Crosscoder,
    known: ModelName,
    acts: Float[Tensor, "n d_in"],
    guess: Float[Tensor, "n d_other"],
) -> Float[Tensor, "n d_other"]:
    """The other model's reconstruction when only `known` is encoded and a prediction replaces the
    other's activations.

    The other model's exclusive latents are ablated: the bias or the prediction could make them
    fire, but by definition `known` lacks their features.

    Args:
        crosscoder: The saved crosscoder.
        known: The model that is encoded.
        acts: Both models' raw activations; the other model's are not used.
        guess: Activations to encode in place of the other model's.
    """
    partition = crosscoder.partition
    other = OTHER[known]
    inputs = partition.models[other]
    read = acts.clone()
    read[:, inputs] = guess.to(read.dtype)
    feature_acts = crosscoder.encode(read)
    feature_acts[:, partition.slices[EXCLUSIVE_TO[other]]] = 0
    return crosscoder.decode(feature_acts)[:, inputs]


@dataclass
class CrossReconstruction:
    """Explained variance of each model's activations when only the other model is encoded.

    - `cross_reconstruction/b_from_a`: B's side of the input is B's mean. It measures what the
      crosscoder itself carries from A to B. It is a lower bound, because a shared latent may need
      both models' contributions to its pre-activation to pass its threshold.
    - `cross_reconstruction/b_from_a/mapped`: B's side is predicted from A's by an affine map. It
      measures how much of B's reconstruction can be obtained from A through the map. It includes
      what the map knows, so it can exceed what the shared latents alone carry from A.

    Compare both with `explained_variance/b`, where B is encoded too. The value is `1 - sum |x_b -
    reconstruction|^2 / sum |x_b - mean|^2`; 0 is as good as B's mean, and it can be negative.
    Universal SAEs (ICML 2025) report the first, as R^2.

    Args:
        crosscoder: The saved crosscoder.
        means: Mean of both models' raw activations, from other text.
        a_to_b: Map from A's raw activations to B's; without it, `b_from_a/mapped` is omitted.
        b_to_a: Map from B's raw activations to A's.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=5, d_sae=8, d_a=2, d_b=3))
    >>> metric = CrossReconstruction(crosscoder, means=torch.zeros(5), a_to_b=lambda acts: acts[:, [0, 0, 1]])
    >>> metric.update(torch.randn(4, 5))
    >>> sorted(metric.compute())
    ['cross_reconstruction/a_from_b', 'cross_reconstruction/b_from_a', 'cross_reconstruction/b_from_a/mapped']
    """

    crosscoder: Crosscoder
    means: Float[Tensor, " d_in"]
    a_to_b: Map | None = None
    b_to_a: Map | None = None
    _sums: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Jackknife(_explained)

    def update(self, acts: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch of both models' raw activations."""
        if len(acts) == 0:
            return
        models = self.crosscoder.partition.models
        means = self.means.to(acts.device)
        sums: dict[str, Tensor] = {}
        maps: dict[ModelName, Map | None] = {"a": self.a_to_b, "b": self.b_to_a}
        for known, to_other in maps.items():
            other = OTHER[known]
            x = acts[:, models[other]]
            guesses = {"": means[models[other]].expand_as(x)}
            if to_other is not None:
                guesses["/mapped"] = to_other(acts[:, models[known]])
            sums |= moments((x - means[models[other]]).double(), f"{other}/")
            for name, guess in guesses.items():
                rebuilt = reconstructed_from(self.crosscoder, known, acts, guess)
                key = f"cross_reconstruction/{other}_from_{known}{name}"
                sums[key] = (x.double() - rebuilt).pow(2).sum()
        self._sums.update(sums)

    def compute(self) -> dict[str, float]:
        """The metrics, each with a standard error, `/se`.

        Raises:
            ValueError: No batch was added.
        """
        return self._sums.compute()


def _explained(sums: Sums) -> dict[str, float]:
    total = {model: squared_deviations(sums, f"{model}/") for model in ("a", "b")}
    prefix = "cross_reconstruction/"
    return {
        name: (1 - error / total[name.removeprefix(prefix)[0]].sum()).item()
        for name, error in sums.items()
        if name.startswith(prefix)
    }
