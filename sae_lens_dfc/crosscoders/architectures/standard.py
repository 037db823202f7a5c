"""The standard ReLU crosscoder, with an L1 penalty weighted by decoder norms."""

from dataclasses import dataclass

from jaxtyping import Float
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig


@dataclass(kw_only=True)
class StandardTrainingCrosscoderConfig(CrosscoderTrainingConfig):
    """Settings of a standard crosscoder (Lindsey et al. 2024, "Sparse crosscoders for cross-layer
    features and model diffing").

    Raises:
        ValueError: The penalty or its warm-up is negative.

    >>> StandardTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=64, l1_coefficient=2.0).d_in
    40
    """

    l1_coefficient: float = 1.0
    """Weight of the L1 penalty, the sum over latents of activation x decoder norm, relative to
    squared errors summed over dimensions. It sets the sparsity; with inputs of variance (d_a + d_b)
    / 2 in each model, start between 1 and 10."""
    l1_warm_up_steps: int = 0
    """Warm-up steps, over which l1_coefficient rises from 0."""
    aux_loss_coefficient: float = 0.0
    """Weight of the loss in which dead latents reconstruct the residual; the original has none."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("l1_coefficient", "l1_warm_up_steps"), "at least 0 and finite")

    @override
    @classmethod
    def architecture(cls) -> str:
        return "standard_crosscoder"


class StandardTrainingCrosscoder(TrainingCrosscoder[StandardTrainingCrosscoderConfig]):
    """A crosscoder in which every latent with a positive pre-activation fires; the penalty on
    `activation x decoder norm` keeps them sparse."""

    @override
    def select(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return scores.relu()

    @override
    def latent_thresholds(self) -> Float[Tensor, " d_sae"]:
        return self.b_enc.new_zeros(self.cfg.d_sae)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        cfg = self.cfg
        return {"l1": TrainCoefficientConfig(cfg.l1_coefficient, cfg.l1_warm_up_steps)}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The L1 penalty."""
        # Feature activations are already multiplied by decoder norms, so their sum is the weighted
        # L1.
        penalty = feature_acts.sum(dim=-1).mean()
        return {"l1_loss": step_input.coefficients["l1"] * penalty}
