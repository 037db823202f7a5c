"""Defines `Crosscoder`, the saved inference form: a JumpReLU SAE on both models' raw
activations."""

from collections.abc import Iterable, Mapping
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

from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.tensor_files import tensors_in
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.export import exported
from sae_lens_dfc.crosscoders.partition import Partition, decoder_norms, max_forbidden_weight
from sae_lens_dfc.stats.affine_maps import AffineMaps


@dataclass(kw_only=True)
class CrosscoderConfig(JumpReLUSAEConfig):
    """Sizes of a saved crosscoder; partitions are saved as numbers of latents, not as fractions."""

    d_a: int = 0
    """Width of model A's activations."""
    d_b: int = 0
    """Width of model B's activations."""
    n_a_exclusive: int = 0
    """Number of latents only model A may use."""
    n_b_exclusive: int = 0
    """Number of latents only model B may use."""
    metadata: Any = field(default_factory=SAEMetadata)
    """Provenance: models, hooks and text. SAELens' `from_dict` first passes a plain dict here."""

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
    """A trained crosscoder on the raw activations of two models, concatenated on the last axis.

    `SAE.load_from_disk` opens it once `sae_lens_dfc` is imported.

    >>> cfg = CrosscoderConfig(d_in=5, d_sae=8, d_a=2, d_b=3, n_a_exclusive=1, n_b_exclusive=1)
    >>> crosscoder = Crosscoder(cfg)
    >>> crosscoder.encode(torch.randn(4, 5)).shape, crosscoder.partition.name_of(0)
    (torch.Size([4, 8]), 'a_exclusive')
    """

    cfg: CrosscoderConfig  # type: ignore[assignment]
    input_scale: Float[Tensor, "2"]
    """Each model's normalization scale in training. It is already folded into the weights; use it
    to compare decoders of two models whose raw activations differ in magnitude."""

    def __init__(self, cfg: CrosscoderConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.register_buffer("input_scale", torch.ones(2, dtype=self.dtype, device=self.device))

    @property
    def partition(self) -> Partition:
        return self.cfg.partition

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, "2 d_sae"]:
        """L2 norm of each latent's decoder in A and in B, on the normalized scale of training."""
        return decoder_norms(self.W_dec, self.partition) * self.input_scale[:, None]

    @torch.no_grad()
    def max_forbidden_weight(self) -> float:
        """Largest absolute weight of an exclusive latent in the model it must not use; exactly 0 if
        sound."""
        return max_forbidden_weight(self.W_enc, self.W_dec, self.partition)

    def export_sae(
        self,
        model: Literal["a", "b"],
        affine_maps: AffineMaps | None = None,
        rows: Iterable[Float[Tensor, "_ d_in"]] | None = None,
    ) -> JumpReLUSAE:
        """Export one model's part of the crosscoder as a SAELens JumpReLU SAE on that model's raw
        activations.

        It works without this package in any tool for SAELens SAEs: `SAE.load_from_disk`,
        HookedSAETransformer, SAETransformerBridge, SAEDashboard, SAEBench. Like the saved
        crosscoder it is a JumpReLU SAE: exclusive latents keep their activations, and shared
        latents keep their thresholds and units.

        - **The model's own exclusive latents are exact**: their activations equal the crosscoder's,
          whatever the other model's activations.
        - **Shared latents are encoded from this model alone.** The other model's contribution to
          their pre-activation is predicted by an affine map from this model, or replaced by its
          mean if no map is given, which is far worse. On the demo's held-out pairs, the explained
          variance of the shared latents' activations is 0.85 with a map, and 0.60 (A) and 0.42 (B)
          without. The explained variance of the models' activations is 0.76 and 0.84 with a map,
          and 0.65 and 0.60 without; the crosscoder's is 0.77 and 0.85. Thresholds at which each
          latent fires as often as in the crosscoder were tried: they trade precision (0.84 to 0.79)
          for recall (0.76 to 0.79), explain the latents' activations no better (0.85) and the
          model's by 0.01 more, so thresholds are kept.
        - **The other model's exclusive latents are left out**: they would have no effect, and a
          decoder row of zeros cannot be normalized to unit norm, which SAEBench requires.
          `cfg.metadata.latents` holds the crosscoder's index of each kept latent.

        Latents keep the crosscoder's units, in which the joint norm of a latent's two decoders is 1
        on the scale of training; `fold_W_dec_norm()` normalizes the remaining decoder to norm 1 and
        multiplies the activations by its norm.

        `cfg.metadata` holds the model, hook and text under SAELens' names; `exported_from`: both
        models and the sizes; `other_model_filled_in_by`; and `difference_to_crosscoder`: the
        metrics of `FeatureActsDifference`, or that they were not measured. If the crosscoder does not
        record its models, as on toy pairs, set `model_name` and `hook_name` there.

        Args:
            model: Which model's part to export.
            affine_maps: Affine maps between the models (`fit_affine_maps`), fitted on rows other than
                `rows`.
            rows: Batches of both models' raw activations, concatenated, on which to measure the
                difference; preferably whole contexts, and not from training.

        Raises:
            ValueError: There is no such model, no latent uses it, or the map or the rows have the
                wrong width.

        >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=5, d_sae=8, d_a=2, d_b=3, n_a_exclusive=1, n_b_exclusive=2))
        >>> sae = crosscoder.export_sae("a")
        >>> sae.encode(torch.randn(4, 2)).shape, sae.cfg.metadata.latents
        (torch.Size([4, 6]), [0, 3, 4, 5, 6, 7])
        """
        return exported(self, self.partition, model, affine_maps, rows)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Check that no exclusive latent has a weight in the other model.

        Raises:
            ValueError: A forbidden weight is not exactly 0.
        """
        super().process_state_dict_for_loading(state_dict)
        largest = max_forbidden_weight(state_dict["W_enc"], state_dict["W_dec"], self.partition)
        if largest != 0:
            raise ValueError(
                f"These weights are not a sound crosscoder: an exclusive latent has a weight of {largest:g} "
                "in the model it must not use. The file was altered; train or download it again."
            )


def load_crosscoder(path: str | Path, device: str = "cpu") -> Crosscoder:
    """Load a saved crosscoder.

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
    cfg = read_object(path / SAE_CFG_FILENAME)
    architecture = cfg.get("architecture")
    if architecture != CrosscoderConfig.architecture():
        raise ValueError(
            f"{path} holds a SAELens {architecture!r}, not a crosscoder. "
            "Give the folder that training wrote."
        )
    try:
        check_metadata(cfg.get("metadata"))
        _check_sizes(cfg, path)
        return SAE.load_from_disk(path, device=device)  # type: ignore[return-value]
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The crosscoder in {path} cannot be read: {type(error).__name__}: {said_by(error)} "
            "The files are damaged or incomplete; train or download it again."
        ) from error


SAFETENSORS_DTYPES = ("F64", "F32", "BF16", "F16")


def _check_sizes(cfg: Mapping[str, Any], path: Path) -> None:
    """Check the weights' shapes against the configuration before allocating memory for either.

    Raises:
        ValueError: Shapes or dtypes do not match, or a setting has the wrong type.
    """
    made = from_plain(CrosscoderConfig, cfg, str(path / SAE_CFG_FILENAME), extra="ignore")
    d_in, d_sae = made.d_in, made.d_sae
    wanted = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
        "input_scale": (2,),
    }
    found = tensors_in(path / SAE_WEIGHTS_FILENAME)
    for name in [*wanted, *found]:
        shape = found[name].shape if name in found else "nothing"
        if shape != wanted.get(name):
            raise ValueError(
                f"{path} holds {shape} as {name}, but its {SAE_CFG_FILENAME} expects {wanted.get(name, 'nothing')}. "
                "The files are damaged, or not of one crosscoder; train or download it again."
            )
        if found[name].dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{path} holds {name} as {found[name].dtype}; the weights of a crosscoder are {', '.join(SAFETENSORS_DTYPES)}."
            )


def check_metadata(metadata: Any) -> None:
    """Check that a crosscoder's metadata is plain provenance, safe to pass to SAELens.

    SAELens sets each key as an attribute, and tells users to load models with
    `model_from_pretrained_kwargs`.

    Raises:
        ValueError: It is not a mapping, has a key that SAELens reserves, or sets
            `trust_remote_code`.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"A crosscoder's metadata must be a mapping, and is {metadata!r:.80}.")
    taken = [name for name in metadata if name.startswith("_") or hasattr(SAEMetadata, name)]
    if taken:
        raise ValueError(f"A crosscoder's metadata cannot have the name {taken[0]!r:.80}.")
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, dict) or kwargs.get("trust_remote_code"):
        raise ValueError(
            "The crosscoder asks for its models to be opened with trust_remote_code, which runs code that comes with them. "
            "A file cannot ask for that: look at the code, open the models yourself, and take it out of the metadata."
        )
