"""Whether the other model has what an exclusive latent stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc import ranks
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, Partition

OTHER_MODEL = {A_EXCLUSIVE: "b", B_EXCLUSIVE: "a"}
MIN_FIRINGS = 10
"""Firings in each half of the data below which a latent is not judged: of pure noise of the latent's own size, 15 % would
be taken for the latent at 2 firings in each half, 0.5 % at 5, none at 10."""
ROUNDING = 1e-4
"""Share of an activation's mean square below which its variance, a difference of sums in float32, may be rounding alone."""


class Evidence(NamedTuple):
    """What a test found of one exclusive partition."""

    slopes: Float[Tensor, "latents d_other"]
    """What each latent, at activation 1, is worth in the other model: the decoder it would have there if it had one, in
    units of its own decoder's norm."""
    own_share: Float[Tensor, " latents"]
    """`own / (own + other)` of the norms of a latent's decoder and of its slope: 1 when the other model has nothing of
    it, 1/2 when it has all of it. It is the relative decoder norm that a shared latent in its place would have."""
    enough: Bool[Tensor, " latents"]
    """Which latents fired often enough, and vary enough, to be judged."""


@dataclass
class OtherModelTest:
    """Regression, over any number of batches, of the other model's unshared activations on each exclusive latent.

    What the shared latents explain of the other model is taken out first, so that a feature which
    merely fires together with another is not mistaken for it. What the other model's own exclusive
    latents explain is left in: there sits the twin, when one shared feature was split in two.
    The two halves of the data give two estimates of a slope, and their product has no bias from noise.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=2, n_b_exclusive=0, n_shared=1)
    >>> test = OtherModelTest(partition)
    >>> acts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    >>> for _ in range(2):  # B has nothing of latent 0 and all of latent 1
    ...     test.update(acts, unshared=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    >>> test.compute()["a_exclusive"].own_share
    tensor([1.0000, 0.5000])
    """

    partition: Partition
    n_batches: int = 0
    """Batches counted so far."""
    _halves: dict[str, list["_Sums"]] = field(default_factory=dict)

    @torch.no_grad()
    def update(
        self,
        feature_acts: Float[Tensor, "batch n_exclusive"],
        unshared: Float[Tensor, "batch d_in"],
    ) -> None:
        """Count a batch in.

        Args:
            feature_acts: Activations of the exclusive latents, in units of their decoders' norms.
            unshared: Normalised activations less what the shared latents explain.
        """
        half = self.n_batches % 2
        # Sums of many products, of which a mean is taken off: half precision would leave nothing of them.
        with torch.autocast(unshared.device.type, enabled=False):
            for name, other in OTHER_MODEL.items():
                x = feature_acts[:, self.partition.slices[name]].to(unshared.dtype)
                y = unshared[:, self.partition.models[other]]
                if self.n_batches == 0:
                    self._halves[name] = [_Sums.zeros_like(x, y) for _ in range(2)]
                self._halves[name][half].add(x, y)
        self.n_batches += 1

    def compute(self) -> dict[str, Evidence]:
        """The evidence of all ranks together, by exclusive partition: each of them finds the same.

        Raises:
            ValueError: Fewer than two batches were counted.
        """
        if self.n_batches < 2:
            raise ValueError(f"A test needs at least two batches, got {self.n_batches}.")
        return {
            name: _evidence(*(half.of_all_ranks() for half in halves))
            for name, halves in self._halves.items()
        }

    def state(self) -> dict[str, Tensor]:
        """What was counted so far, as tensors by name."""
        state = {"n_batches": torch.tensor(self.n_batches)}
        for name, halves in self._halves.items():
            for i, half in enumerate(halves):
                state |= {f"{name}.{i}.{key}": torch.as_tensor(x) for key, x in vars(half).items()}
        return state

    @classmethod
    def of(cls, partition: Partition, state: Mapping[str, Tensor]) -> "OtherModelTest":
        """A test that goes on from `state`."""
        test = cls(partition, int(state["n_batches"]))
        for name in OTHER_MODEL:
            for i in range(2):
                sums = {f.name: state[f"{name}.{i}.{f.name}"] for f in fields(_Sums)}
                sums["n"] = int(sums["n"])  # type: ignore[assignment]
                test._halves.setdefault(name, []).append(_Sums(**sums))  # type: ignore[arg-type]
        return test


@dataclass
class _Sums:
    """What a regression with an intercept needs: an activation is never negative, so its mean is no evidence."""

    n: int
    firings: Float[Tensor, " n_x"]
    x: Float[Tensor, " n_x"]
    y: Float[Tensor, " n_y"]
    squares: Float[Tensor, " n_x"]
    products: Float[Tensor, "n_x n_y"]

    @classmethod
    def zeros_like(cls, x: Float[Tensor, "batch n_x"], y: Float[Tensor, "batch n_y"]) -> "_Sums":
        n_x, n_y = x.shape[1], y.shape[1]
        shapes = ((n_x,), (n_x,), (n_y,), (n_x,), (n_x, n_y))
        return cls(0, *(y.new_zeros(shape) for shape in shapes))

    def add(self, x: Float[Tensor, "batch n_x"], y: Float[Tensor, "batch n_y"]) -> None:
        self.n += len(x)
        self.firings += (x > 0).sum(dim=0)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.squares += x.pow(2).sum(dim=0)
        self.products += x.T @ y

    def of_all_ranks(self) -> "_Sums":
        n = int(ranks.total(torch.tensor(self.n, device=self.x.device)))
        sums = self.firings, self.x, self.y, self.squares, self.products
        return _Sums(n, *(ranks.total(x) for x in sums))

    @property
    def varies(self) -> Bool[Tensor, " n_x"]:
        """Which latents' activations vary by more than sums in float32 can be off."""
        return self._variance > ROUNDING * self.squares

    @property
    def _variance(self) -> Float[Tensor, " n_x"]:
        return self.squares - self.x.pow(2) / self.n

    def slopes(self) -> Float[Tensor, "n_x n_y"]:
        """0 of a latent that does not vary, of which nothing is known."""
        covariance = self.products - torch.outer(self.x, self.y) / self.n
        slopes = covariance / self._variance[:, None]
        return slopes.where(self.varies[:, None], 0.0)


def _can_tell(half: _Sums) -> Bool[Tensor, " n_x"]:
    return (half.firings >= MIN_FIRINGS) & half.varies


def _evidence(one: _Sums, other: _Sums) -> Evidence:
    slopes = one.slopes(), other.slopes()
    norms = (slopes[0] * slopes[1]).sum(dim=-1).clamp(min=0).sqrt()
    return Evidence(
        slopes=(slopes[0] + slopes[1]) / 2,
        # An activation is in units of the latent's own norm, which is therefore 1.
        own_share=1 / (1 + norms),
        enough=_can_tell(one) & _can_tell(other),
    )
