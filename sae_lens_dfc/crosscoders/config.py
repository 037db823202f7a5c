"""Defines `CrosscoderTrainingConfig`, the settings that all crosscoders share."""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from typing_extensions import override

from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
from sae_lens_dfc.crosscoders.partition import Partition


def require_finite(cfg: object, names: Sequence[str]) -> None:
    """Check that these settings are finite and at least 0.

    Raises:
        ValueError: One is not; the message names the first.
    """
    for name in names:
        value = getattr(cfg, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


@dataclass(kw_only=True)
class CrosscoderTrainingConfig(TrainingSAEConfig, ABC):
    """Settings that all training crosscoders share.

    Raises:
        ValueError: A width or a partition does not fit; the message names the field.
    """

    d_sae: int
    """Number of latents."""
    d_a: int = 0
    """Width of model A's activations; 0 lets `CrosscoderTrainingRunner` read it from the model."""
    d_b: int = 0
    """Width of model B's activations; 0 likewise."""
    d_in: int = 0
    """Width of the concatenated activations, always d_a + d_b; filled in when left at 0."""
    decoder_init_norm: float | None = 0.4
    """Norm of each latent's decoder in each model at initialization (0.4 in arXiv 2602.11729, table
    2)."""
    normalization: Literal["variance", "median_norm", "none"] = "variance"
    """Normalization of each model's input. variance: subtract the mean, then scale the total
    variance to (d_a + d_b) / 2. median_norm: scale the median L2 norm to sqrt((d_a + d_b) / 2)
    without centering (arXiv 2602.11729, appendix B.1)."""
    decoder_norm: Literal["sum", "l2"] = "sum"
    """Norm by which a latent's activation is weighted. sum: the sum of its two decoder norms
    (Lindsey 2024). l2: the norm of its concatenated decoder row, whose square is what the latent
    adds to the reconstruction."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the loss in which dead latents reconstruct the residual (AuxK, Gao et al. 2024)."""
    k_aux: int | None = None
    """Number of dead latents that reconstruct a pair's residual; none uses (d_a + d_b) / 4 (arXiv
    2602.11729, table 3; its text says 512, its public code half of one width)."""
    dtype: str = "float32"
    """dtype of the weights: float32 or float64."""
    device: str = "cpu"
    """Device on which the weights are created; the runner moves them to its own device."""

    @override
    def __post_init__(self) -> None:
        if self.d_a < 0 or self.d_b < 0:
            raise ValueError(f"d_a and d_b must be at least 1, got {self.d_a} and {self.d_b}.")
        if self.d_in not in (0, self.d_a + self.d_b):
            raise ValueError(
                f"d_in={self.d_in}, but d_a + d_b = {self.d_a + self.d_b}. Set d_a and d_b to the models' "
                "widths; d_in follows from them."
            )
        self.d_in = self.d_a + self.d_b
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} puts one scale on both models. "
                "Leave it at 'none' and choose `normalization`, which scales each model by itself."
            )
        if not self.apply_b_dec_to_input or self.reshape_activations != "none":
            raise ValueError(
                "A crosscoder subtracts its decoder bias from its input and takes flat activations: leave "
                "apply_b_dec_to_input at True and reshape_activations at 'none'."
            )
        if self.dtype not in ("float32", "float64"):
            raise ValueError(
                f"A crosscoder's dtype must be float32 or float64, got {self.dtype!r}: raw activations lose their mean "
                "in less. For speed set autocast in the runner."
            )
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux must be at least 1, got {self.k_aux}.")
        if self.decoder_init_norm is not None and not 0 < self.decoder_init_norm < math.inf:
            raise ValueError(
                f"decoder_init_norm must be a finite number above 0, got {self.decoder_init_norm}."
            )
        require_finite(self, ("aux_loss_coefficient",))
        if self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}.")
        _ = self.partition  # raises when the sizes do not fit
        super().__post_init__()

    @property
    def n_a_exclusive(self) -> int:
        """Number of latents only model A may use."""
        return 0

    @property
    def n_b_exclusive(self) -> int:
        """Number of latents only model B may use."""
        return 0

    @property
    def partition(self) -> Partition:
        return Partition.of(self.d_a, self.d_b, self.d_sae, self.n_a_exclusive, self.n_b_exclusive)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return CrosscoderConfig


T_CONFIG = TypeVar("T_CONFIG", bound=CrosscoderTrainingConfig)
