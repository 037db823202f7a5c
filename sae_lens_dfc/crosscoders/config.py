"""Defines `CrosscoderTrainingConfig`, the settings that all crosscoders share."""

from abc import ABC
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import GetCoreSchemaHandler, PlainValidator
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAEConfig
from typing_extensions import override

from sae_lens_dfc.core.schema import from_plain, require
from sae_lens_dfc.crosscoders.inference import CrosscoderConfig, check_metadata
from sae_lens_dfc.crosscoders.partition import Partition


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
        require(self, ("k_aux", "d_sae"), "at least 1")
        require(self, ("decoder_init_norm",))
        require(self, ("aux_loss_coefficient",), "at least 0 and finite")
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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> Any:
        if cls is CrosscoderTrainingConfig:
            return handler.generate_schema(Annotated[Any, PlainValidator(_registered)])
        return handler(source)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return CrosscoderConfig


def _registered(values: Any) -> CrosscoderTrainingConfig:
    """Settings of whichever architecture they name."""
    if not isinstance(values, dict) or not isinstance(name := values.get("architecture"), str):
        raise ValueError(
            f"The run's crosscoder must be a mapping with its architecture, got {values!r:.80}."
        )
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"The run's architecture {name!r} is not registered with SAELens here. If it is your own, import the module that "
            "registers it first (tutorials/6_your_own_architecture.ipynb shows a command that does)."
        )
    config_class = SAE_TRAINING_CLASS_REGISTRY[name][1]
    if not issubclass(config_class, CrosscoderTrainingConfig):
        raise ValueError(
            f"The run's architecture {name!r} is a SAELens SAE for one model, not a crosscoder."
        )
    metadata = values.get("metadata", {})
    check_metadata(metadata)
    own = {name: value for name, value in values.items() if name != "metadata"}
    cfg = from_plain(config_class, own, f"The run's {name}", extra="ignore")
    cfg.metadata = SAEMetadata(**metadata)
    return cfg


T_CONFIG = TypeVar("T_CONFIG", bound=CrosscoderTrainingConfig)
