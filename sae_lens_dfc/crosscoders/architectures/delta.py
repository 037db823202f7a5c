"""The Delta-Crosscoder: latents for the models' difference have their own budget and loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.architectures.topk import (
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.base import PartialLoss
from sae_lens_dfc.crosscoders.losses import difference_loss


@dataclass(kw_only=True)
class DeltaTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a Delta-Crosscoder (arXiv 2603.04426), for a model A and its fine-tune B.

    The training text matters as much: for each prompt, the paper adds both models' answers, each
    read by both models; such pairs are given like any other text. The paper's mean of two
    pre-activations is a sum here, as in all our crosscoders. Its L1 term, for which it gives no
    weight, is left out.

    Raises:
        ValueError: The two widths differ, or a group of latents is empty.

    >>> cfg = DeltaTrainingCrosscoderConfig(d_a=16, d_b=16, d_sae=60, k=6)
    >>> cfg.n_delta, cfg.delta_share_of_k
    (48, 0.3333333333333333)
    """

    shared_fraction: float = 0.2
    """Fraction of the latents that take no part in the difference loss; there are floor(fraction x
    d_sae)."""
    k_shared_ratio: float = 2.0
    """Ratio of active shared latents to active difference latents; k = 600 gives the paper's 400
    and 200."""
    delta_loss_coefficient: float = 0.005
    """Weight of the loss on the two models' difference, measured in a common unit, the geometric
    mean of the models' scales."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_a != self.d_b:
            raise ValueError(
                "A Delta-Crosscoder learns from the difference of the two models' activations, which needs one width "
                f"and one basis; got d_a={self.d_a} and d_b={self.d_b}. Use dfc or batchtopk_crosscoder."
            )
        require(self, ("shared_fraction",), "at least 0 and at most 1")
        if not 0 < self.n_delta < self.d_sae:
            raise ValueError(
                f"shared_fraction={self.shared_fraction} of d_sae={self.d_sae} leaves {self.n_delta} latents for the "
                "difference; there must be some of both."
            )
        require(self, ("delta_loss_coefficient",), "at least 0 and finite")
        require(self, ("k_shared_ratio",))

    @property
    def n_delta(self) -> int:
        """Number of latents that reconstruct the difference; they come first."""
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
    """A BatchTopK crosscoder with two budgets, whose first latents must also reconstruct the
    models' difference on their own."""

    @override
    def topk_groups(self) -> list[tuple[slice, float]]:
        n, share = self.cfg.n_delta, self.cfg.delta_share_of_k
        return [(slice(0, n), share), (slice(n, self.cfg.d_sae), 1 - share)]

    @override
    def partial_losses(self) -> dict[str, PartialLoss]:
        return {"delta_loss": PartialLoss(slice(0, self.cfg.n_delta), self._difference_loss)}

    def _difference_loss(self, acts: Tensor, reconstruction: Tensor) -> Tensor:
        # Normalization scales each model separately: bring both back to a common unit before
        # subtracting.
        units = torch.exp(self.input_scale.log().mean()) / self.input_scale
        loss = difference_loss(acts, reconstruction, units.to(acts.dtype), self.partition)
        return self.cfg.delta_loss_coefficient * loss
