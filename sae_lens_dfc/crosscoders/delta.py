"""The Delta-Crosscoder: latents of the difference have a budget and a loss of their own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.crosscoders.base import require_finite
from sae_lens_dfc.crosscoders.losses import difference_loss
from sae_lens_dfc.crosscoders.topk import (
    Part,
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
)


@dataclass(kw_only=True)
class DeltaTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a Delta-Crosscoder (arXiv 2603.04426), for a model A and its fine-tune B.

    What it is trained on matters as much: the paper adds, for each prompt, both models' answers, each
    read by both models, to the text. It takes such pairs as it takes any text. The paper's mean of
    two pre-activations is a sum here, as in all our crosscoders, and its L1 term, for which it
    gives no weight, is left out.

    Raises:
        ValueError: The two widths differ, or a group of latents is empty.

    >>> cfg = DeltaTrainingCrosscoderConfig(d_a=16, d_b=16, d_sae=60, k=6)
    >>> cfg.n_delta, cfg.delta_share_of_k
    (48, 0.3333333333333333)
    """

    shared_fraction: float = 0.2
    """Share of the latents that take no part in the difference loss; the floor of share x d_sae is their number."""
    k_shared_ratio: float = 2.0
    """Active shared latents for each active other one: with k = 600 it is the paper's 400 and 200."""
    delta_loss_coefficient: float = 0.005
    """Weight of the loss on the two models' difference, in the models' common unit: the geometric mean of their scales."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_a != self.d_b:
            raise ValueError(
                "A Delta-Crosscoder learns from the difference of the two models' activations, which needs one width "
                f"and one basis; got d_a={self.d_a} and d_b={self.d_b}. Use dfc or batchtopk_crosscoder."
            )
        if not 0 <= self.shared_fraction <= 1:
            raise ValueError(f"shared_fraction must be from 0 to 1, got {self.shared_fraction}.")
        if not 0 < self.n_delta < self.d_sae:
            raise ValueError(
                f"shared_fraction={self.shared_fraction} of d_sae={self.d_sae} leaves {self.n_delta} latents for the "
                "difference; there must be some of both."
            )
        require_finite(self, ("delta_loss_coefficient",))
        if not 0 < self.k_shared_ratio < math.inf:
            raise ValueError(
                f"k_shared_ratio must be above 0 and finite, got {self.k_shared_ratio}."
            )

    @property
    def n_delta(self) -> int:
        """Number of latents that rebuild the difference; they come first."""
        return self.d_sae - math.floor(self.shared_fraction * self.d_sae)

    @property
    def delta_share_of_k(self) -> float:
        """Their share of `k`."""
        return 1 / (1 + self.k_shared_ratio)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "delta_crosscoder"


class DeltaTrainingCrosscoder(TopKTrainingCrosscoder[DeltaTrainingCrosscoderConfig]):
    """A BatchTopK crosscoder with two budgets, whose first latents also rebuild the difference of the models alone."""

    @override
    def budgets(self) -> list[tuple[slice, float]]:
        n, share = self.cfg.n_delta, self.cfg.delta_share_of_k
        return [(slice(0, n), share), (slice(n, self.cfg.d_sae), 1 - share)]

    @override
    def parts(self) -> dict[str, Part]:
        return {"delta_loss": Part(slice(0, self.cfg.n_delta), self._difference_loss)}

    def _difference_loss(self, acts: Tensor, reconstruction: Tensor) -> Tensor:
        # Each model has its own scale: the difference is taken of the activations as they are, in their joint unit.
        units = torch.exp(self.input_scale.log().mean()) / self.input_scale
        loss = difference_loss(acts, reconstruction, units.to(acts.dtype), self.partition)
        return self.cfg.delta_loss_coefficient * loss
