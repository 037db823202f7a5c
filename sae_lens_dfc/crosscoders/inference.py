"""The saved form of every crosscoder: raw activations in, a threshold on each latent, no training code."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.crosscoders.export import exported
from sae_lens_dfc.crosscoders.partition import Partition, decoder_norms, leak
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.texts import first_line


@dataclass(kw_only=True)
class CrosscoderConfig(JumpReLUSAEConfig):
    """Sizes of a saved crosscoder: the numbers of latents are saved, not the fractions they came from."""

    d_a: int = 0
    """Width of model A's activations."""
    d_b: int = 0
    """Width of model B's activations."""
    n_a_exclusive: int = 0
    """Number of latents only model A may use."""
    n_b_exclusive: int = 0
    """Number of latents only model B may use."""
    metadata: Any = field(default_factory=SAEMetadata)
    """Where it comes from: the models, hooks and text. SAELens' `from_dict` passes a plain dict here at first."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_a < 1 or self.d_b < 1 or self.d_a + self.d_b != self.d_in:
            raise ValueError(
                f"A crosscoder's d_in is d_a + d_b, both at least 1; got d_in={self.d_in}, "
                f"d_a={self.d_a}, d_b={self.d_b}."
            )
        _ = self.partition  # raises when the sizes do not fit

    @property
    def partition(self) -> Partition:
        return Partition.of(self.d_a, self.d_b, self.d_sae, self.n_a_exclusive, self.n_b_exclusive)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "crosscoder"


class Crosscoder(JumpReLUSAE):
    """A trained crosscoder on the raw activations of two models, joined on the last axis.

    `SAE.load_from_disk` opens it once `sae_lens_dfc` is imported.

    >>> cfg = CrosscoderConfig(d_in=5, d_sae=8, d_a=2, d_b=3, n_a_exclusive=1, n_b_exclusive=1)
    >>> crosscoder = Crosscoder(cfg)
    >>> crosscoder.encode(torch.randn(4, 5)).shape, crosscoder.partition.name_of(0)
    (torch.Size([4, 8]), 'a_exclusive')
    """

    cfg: CrosscoderConfig  # type: ignore[assignment]
    input_scale: Float[Tensor, "2"]
    """Scale that each model's activations had in training. The weights contain it already; it serves to compare the
    decoders of two models whose raw activations differ in size."""

    def __init__(self, cfg: CrosscoderConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.register_buffer("input_scale", torch.ones(2, dtype=self.dtype, device=self.device))

    @property
    def partition(self) -> Partition:
        return self.cfg.partition

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, "2 d_sae"]:
        """L2 norm of each latent's decoder in A and in B, on the scale that both models had in training."""
        return decoder_norms(self.W_dec, self.partition) * self.input_scale[:, None]

    @torch.no_grad()
    def leak(self) -> float:
        """Largest absolute weight of an exclusive latent in the model it must not use: exactly 0."""
        return leak(self.W_enc, self.W_dec, self.partition)

    def export_sae(
        self,
        model: Literal["a", "b"],
        stitching: Stitching | None = None,
        rows: Iterable[Float[Tensor, "_ d_in"]] | None = None,
    ) -> JumpReLUSAE:
        """TODO."""
        return exported(self, self.partition, model, stitching, rows)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Refuse a file in which an exclusive latent touches the other model.

        Raises:
            ValueError: A forbidden weight is not exactly 0.
        """
        super().process_state_dict_for_loading(state_dict)
        largest = leak(state_dict["W_enc"], state_dict["W_dec"], self.partition)
        if largest != 0:
            raise ValueError(
                f"These weights are not a sound crosscoder: an exclusive latent has a weight of {largest:g} "
                "in the model it must not use. The file was altered; train or download it again."
            )


def load_crosscoder(path: str | Path, device: str = "cpu") -> Crosscoder:
    """Open a saved crosscoder.

    Raises:
        ValueError: The folder holds no crosscoder; the message says what is missing.
    """
    path = Path(path)
    missing = [n for n in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME) if not (path / n).is_file()]
    if missing:
        raise ValueError(
            f"{path} is not a crosscoder: it has no {' and no '.join(missing)}. "
            "Give the folder that training wrote."
        )
    try:
        architecture = json.loads((path / SAE_CFG_FILENAME).read_text()).get("architecture")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path / SAE_CFG_FILENAME} is not a JSON configuration: {error}"
        ) from None
    if architecture != CrosscoderConfig.architecture():
        raise ValueError(
            f"{path} holds a SAELens {architecture!r}, not a crosscoder. "
            "Give the folder that training wrote."
        )
    try:
        return SAE.load_from_disk(path, device=device)  # type: ignore[return-value]
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The crosscoder in {path} cannot be read: {type(error).__name__}: {first_line(error)} "
            "The files are damaged or incomplete; train or download it again."
        ) from error
