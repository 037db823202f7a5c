"""Tests whether an exclusive latent's feature is also present in the other model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.core import distributed
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.models.config import ModelName

OTHER_MODEL: dict[str, ModelName] = {A_EXCLUSIVE: "b", B_EXCLUSIVE: "a"}
MIN_FIRINGS_PER_HALF = 10
"""Minimum firings in each half of the data to judge a latent: pure noise of the latent's own
magnitude is mistaken for the latent in 15 % of cases at 2 firings in each half, in 0.5 % at 5, and
in none at 10."""
NORM_TOLERANCE = 1e-4
"""Share of an activation's mean square below which its variance, a difference of float32 sums, may
be pure rounding error."""


class Evidence(NamedTuple):
    """Result of a test for one exclusive partition."""

    slopes: Float[Tensor, "latents d_other"]
    """Each latent's regression slope in the other model, i.e. the decoder it would have there, in
    units of its own decoder's norm."""
    own_share: Float[Tensor, " latents"]
    """`own / (own + other)`, where `own` is the norm of a latent's decoder and `other` that of its
    slope: 1 if the feature is absent from the other model, 1/2 if it is fully present. It is the
    relative decoder norm that a shared latent in its place would have."""
    enough: Bool[Tensor, " latents"]
    """Which latents fired often enough and vary enough to be judged."""


@dataclass
class ReassignmentTest:
    """Regresses the other model's unshared activations on each exclusive latent, over any number of
    batches.

    The shared latents' part of the other model's activations is subtracted first, so that a feature
    that merely co-occurs with a latent is not mistaken for it. The part of the other model's own
    exclusive latents is kept: if one shared feature was split in two, its twin is there. Each half
    of the data gives one estimate of a slope, and the product of the two has no bias from noise.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=2, n_b_exclusive=0, n_shared=1)
    >>> test = ReassignmentTest(partition)
    >>> acts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    >>> for _ in range(2):  # latent 0 is absent from B, latent 1 is fully present
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
        """Add a batch.

        Args:
            feature_acts: Activations of the exclusive latents, in units of their decoders' norms.
            unshared: Normalized activations minus the shared latents' reconstruction.
        """
        half = self.n_batches % 2
        # A mean is subtracted from sums of many products; half precision would lose the difference.
        with torch.autocast(unshared.device.type, enabled=False):
            for name, other in OTHER_MODEL.items():
                x = feature_acts[:, self.partition.slices[name]].to(unshared.dtype)
                y = unshared[:, self.partition.models[other]]
                if self.n_batches == 0:
                    self._halves[name] = [_Sums.zeros_like(x, y) for _ in range(2)]
                self._halves[name][half].add(x, y)
        self.n_batches += 1

    def compute(self) -> dict[str, Evidence]:
        """The evidence over all ranks, by exclusive partition; it is the same on each rank.

        Raises:
            ValueError: Fewer than two batches were added.
        """
        if self.n_batches < 2:
            raise ValueError(f"A test needs at least two batches, got {self.n_batches}.")
        return {
            name: _evidence(*(half.of_all_ranks() for half in halves))
            for name, halves in self._halves.items()
        }

    def state(self) -> dict[str, Tensor]:
        """The state of the regression, as tensors by name."""
        state = {"n_batches": torch.tensor(self.n_batches)}
        for name, halves in self._halves.items():
            for i, half in enumerate(halves):
                state |= {f"{name}.{i}.{key}": torch.as_tensor(x) for key, x in vars(half).items()}
        return state

    @classmethod
    def of(cls, partition: Partition, state: Mapping[str, Tensor]) -> "ReassignmentTest":
        """Restore a test from its `state`."""
        test = cls(partition, int(state["n_batches"]))
        for name in OTHER_MODEL:
            for i in range(2):
                sums = {f.name: state[f"{name}.{i}.{f.name}"] for f in fields(_Sums)}
                sums["n"] = int(sums["n"])  # type: ignore[assignment]
                test._halves.setdefault(name, []).append(_Sums(**sums))  # type: ignore[arg-type]
        return test


@dataclass
class _Sums:
    """Sufficient statistics of a regression with an intercept. Activations are never negative, so
    their mean alone is no evidence."""

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
        n = int(distributed.all_reduce_sum(torch.tensor(self.n, device=self.x.device)))
        sums = self.firings, self.x, self.y, self.squares, self.products
        return _Sums(n, *(distributed.all_reduce_sum(x) for x in sums))

    @property
    def varies(self) -> Bool[Tensor, " n_x"]:
        """Which latents' activations vary by more than the rounding error of float32 sums."""
        return self._variance > NORM_TOLERANCE * self.squares

    @property
    def _variance(self) -> Float[Tensor, " n_x"]:
        return self.squares - self.x.pow(2) / self.n

    def slopes(self) -> Float[Tensor, "n_x n_y"]:
        """Slopes of `y` on each `x`; 0 for a latent that does not vary."""
        covariance = self.products - torch.outer(self.x, self.y) / self.n
        slopes = covariance / self._variance[:, None]
        return slopes.where(self.varies[:, None], 0.0)


def _has_enough_firings(half: _Sums) -> Bool[Tensor, " n_x"]:
    return (half.firings >= MIN_FIRINGS_PER_HALF) & half.varies


def _evidence(one: _Sums, other: _Sums) -> Evidence:
    slopes = one.slopes(), other.slopes()
    norms = (slopes[0] * slopes[1]).sum(dim=-1).clamp(min=0).sqrt()
    return Evidence(
        slopes=(slopes[0] + slopes[1]) / 2,
        # Activations are in units of the latent's own decoder norm, which is therefore 1.
        own_share=1 / (1 + norms),
        enough=_has_enough_firings(one) & _has_enough_firings(other),
    )
