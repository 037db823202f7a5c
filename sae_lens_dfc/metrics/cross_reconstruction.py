"""What one model's activations alone say of the other's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.metrics.reconstruction import moments, squared_deviations
from sae_lens_dfc.metrics.spread import Jackknife, Sums

Model = Literal["a", "b"]
Map = Callable[[Float[Tensor, "n d_from"]], Float[Tensor, "n d_to"]]
"""From one model's raw activations to a guess of the other's."""


@torch.no_grad()
def reconstructed_from(
    crosscoder: Crosscoder,
    known: Model,
    acts: Float[Tensor, "n d_in"],
    guess: Float[Tensor, "n d_other"],
) -> Float[Tensor, "n d_other"]:
    """The other model's reconstruction when only `known` is read and a guess stands in for the other.

    The other model's exclusive latents are silenced: their bias, or the guess, would make them fire, and they are
    just what `known` does not have.

    Args:
        crosscoder: The saved crosscoder.
        known: The model that is read.
        acts: Both models' raw activations; of the other model's nothing is used.
        guess: What to encode in their place.
    """
    partition = crosscoder.partition
    other = partition.models["b" if known == "a" else "a"]
    read = acts.clone()
    read[:, other] = guess.to(read.dtype)
    feature_acts = crosscoder.encode(read)
    feature_acts[:, partition.slices[B_EXCLUSIVE if known == "a" else A_EXCLUSIVE]] = 0
    return crosscoder.decode(feature_acts)[:, other]


@dataclass
class CrossReconstruction:
    """Explained variance of each model's activations when only the other model is read.

    - `cross_reconstruction/b_from_a`: B's side of the input is B's mean. What the crosscoder itself carries from A
      to B. A lower bound: a shared latent needs both models' share of its pre-activation to pass its threshold.
    - `cross_reconstruction/b_from_a/mapped`: B's side is guessed from A's by a map made for that. It says how much of
      B's reconstruction needs no more of B than a map from A knows. It holds the map's knowledge too, so it can be
      above what the shared latents alone carry from A.

    Both are to be read beside `explained_variance/b`, where B is read too. `1 - sum |x_b - reconstruction|^2 / sum |x_b -
    mean|^2`; 0 is as good as B's mean, and it can be negative. Universal SAEs (ICML 2025) have the
    first, as R^2.

    Args:
        crosscoder: The saved crosscoder.
        means: Mean of both models' raw activations, of other text.
        a_to_b: Map from A's raw activations to B's; without it there is no `b_from_a/mapped`.
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
        """Count a batch of both models' raw activations in."""
        if len(acts) == 0:
            return
        models = self.crosscoder.partition.models
        means = self.means.to(acts.device)
        sums: dict[str, Tensor] = {}
        directions: list[tuple[Model, str, Map | None]] = [
            ("a", "b", self.a_to_b),
            ("b", "a", self.b_to_a),
        ]
        for known, other, to_other in directions:
            x = acts[:, models[other]]
            guesses = {"": means[models[other]].expand_as(x)}
            if to_other is not None:
                guesses["/mapped"] = to_other(acts[:, models[known]])
            centred = (x - means[models[other]]).double()
            sums |= {f"{other}/{name}": value for name, value in moments(centred).items()}
            for name, guess in guesses.items():
                rebuilt = reconstructed_from(self.crosscoder, known, acts, guess)
                key = f"cross_reconstruction/{other}_from_{known}{name}"
                sums[key] = (x.double() - rebuilt).pow(2).sum()
        self._sums.update(sums)

    def compute(self) -> dict[str, float]:
        """The measures, each with its `/se`.

        Raises:
            ValueError: No batch was counted.
        """
        return self._sums.compute()


def _explained(sums: Sums) -> dict[str, float]:
    total = {
        model: squared_deviations({name: sums[f"{model}/{name}"] for name in ("n", "x", "xx")})
        for model in ("a", "b")
    }
    prefix = "cross_reconstruction/"
    return {
        name: (1 - error / total[name.removeprefix(prefix)[0]].sum()).item()
        for name, error in sums.items()
        if name.startswith(prefix)
    }
