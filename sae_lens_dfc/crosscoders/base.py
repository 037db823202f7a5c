"""What every crosscoder in training does: join two models, scale each, select, and fold it all at the end."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_dfc import ranks
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.crosscoders.losses import (
    dead_latent_loss,
    dead_latents_decoded,
    explained_variances,
    reconstruction_losses,
)
from sae_lens_dfc.crosscoders.partition import (
    Partition,
    decode_blocks,
    decoder_norms,
    encode_blocks,
    zero_forbidden_,
)
from sae_lens_dfc.crosscoders.sparse import firing_counts

# A latent whose decoder vanished must not turn the scores into NaN.
MIN_DECODER_NORM = 1e-8
# Rows that differ by less than this share of their mean's norm differ by no more than float32's rounding.
ROUNDING = 1e-6
# Name of the dead latents' loss in SAELens.
DEAD = "auxiliary_reconstruction_loss"


def require_finite(cfg: object, names: Sequence[str]) -> None:
    """Raise ValueError for the first of these settings that is not a finite number of at least 0."""
    for name in names:
        value = getattr(cfg, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


@dataclass(kw_only=True)
class CrosscoderTrainingConfig(TrainingSAEConfig, ABC):
    """What all crosscoders in training share.

    Raises:
        ValueError: A width or a partition does not fit; the message names the field.
    """

    d_sae: int
    """Number of latents."""
    d_a: int = 0
    """Width of model A's activations; 0 lets `CrosscoderTrainingRunner` take it from the model."""
    d_b: int = 0
    """Width of model B's activations; 0 likewise."""
    d_in: int = 0
    """Width of the joined activations: always d_a + d_b, filled in when left at 0."""
    decoder_init_norm: float | None = 0.4
    """Norm, in each model, of a fresh decoder row (0.4 in arXiv 2602.11729, table 2)."""
    normalization: Literal["variance", "median_norm", "none"] = "variance"
    """Scale of each model's input. variance: subtract the mean, then one scalar makes the total variance (d_a + d_b) / 2.
    median_norm: one scalar makes the median L2 norm sqrt((d_a + d_b) / 2), no centring (arXiv 2602.11729, appendix B.1)."""
    decoder_norm: Literal["sum", "l2"] = "sum"
    """Norm by which a latent's activation is weighed. sum: of its two decoder norms (Lindsey 2024).
    l2: of its joined decoder row, whose square is what the latent adds to the reconstruction."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the loss by which dead latents rebuild the residual (Gao et al. 2024)."""
    k_aux: int | None = None
    """Dead latents that rebuild a pair's residual; none takes (d_a + d_b) / 4 (arXiv 2602.11729, table 3; its text says
    512, its public code half of one width)."""
    dtype: str = "float32"
    """Number format of the weights: float32 or float64."""
    device: str = "cpu"
    """Device on which the weights are made; a runner moves them to its own."""

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


def latents_together(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same encoder, in memory its transpose: the weights of a latent lie together, as their gradient is made.

    >>> latents_together(torch.ones(2, 3)).stride()
    (1, 2)
    """
    return W_enc.T.clone(memory_format=torch.contiguous_format).T


def _no_scale(model: str, power: float, n_rows: int) -> str:
    start = f"Model {model.upper()}'s activations have no scale: over {n_rows} pairs their mean square is {power:g}"
    if math.isfinite(power):
        return (
            f"{start}, no more than rounding. All are alike, or too small to be squared in float32 (1e-19 and below). Check the "
            "hook and the text, or give more pairs (n_batches_for_norm_estimate)."
        )
    return (
        f"{start}. Some are NaN or infinite, or too large to be squared in float32 (1e19 and above). Check the hook, leave "
        "such pairs out, or load the model in bfloat16 or float32: float16 overflows in some."
    )


@dataclass
class CountedStepInput(TrainStepInput):
    """A training step's input whose dead latents are counted: nobody has to wait for a GPU to say how many."""

    n_dead: int
    """How many latents `dead_neuron_mask` marks."""


T_CONFIG = TypeVar("T_CONFIG", bound=CrosscoderTrainingConfig)


class TrainingCrosscoder(TrainingSAE[T_CONFIG], Generic[T_CONFIG], ABC):
    """A SAELens `TrainingSAE` on the two models' activations joined on the last axis, `(batch, d_a + d_b)`.

    It takes raw activations. While it trains, it keeps one mean and one scale for each model
    (fitted on the first batch it sees, or before by `fit_normalization`); the inference form that
    `save_inference_model` writes has them folded into its weights. In eval mode latents are selected
    by the thresholds that the inference form uses. `W_enc` lies in memory as its transpose; who writes
    the state dict with safetensors makes it contiguous first, as `save_model` does.
    """

    b_enc: nn.Parameter
    input_mean: Float[Tensor, " d_in"]
    input_scale: Float[Tensor, "2"]

    def __init__(self, cfg: T_CONFIG, use_error_term: bool = False):
        if cfg.d_in != cfg.d_a + cfg.d_b or min(cfg.d_a, cfg.d_b) < 1:
            raise ValueError(
                f"A crosscoder needs both widths, and d_in is their sum; got d_in={cfg.d_in}, d_a={cfg.d_a}, "
                f"d_b={cfg.d_b}. Set d_a and d_b to the widths of the two models' activations."
            )
        super().__init__(cfg, use_error_term)
        self._is_fitted = False
        device = self.W_dec.device
        self.register_buffer("input_mean", torch.zeros(cfg.d_in, device=device))
        self.register_buffer("input_scale", torch.zeros(2, device=device))

    @abstractmethod
    def select(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """In training, the scores of the latents that fire, zeros for the others."""

    @abstractmethod
    def latent_thresholds(self) -> Float[Tensor, " d_sae"]:
        """After training, the score above which each latent fires."""

    def decoder(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder that is used; an architecture that ties weights says here how."""
        return self.W_dec

    @property
    def partition(self) -> Partition:
        return self.cfg.partition

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        with torch.no_grad():
            if self.cfg.decoder_init_norm is not None:
                for inputs in self.partition.models.values():
                    part = self.W_dec.data[:, inputs]
                    part *= self.cfg.decoder_init_norm / part.norm(dim=-1, keepdim=True)
            self.W_enc.data = latents_together(self.W_dec.data.T)
            zero_forbidden_(self.W_enc.data, self.W_dec.data, self.partition)
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    # --- scales of the two models ---

    @torch.no_grad()
    def fit_normalization(self, acts: Float[Tensor, "n d_in"]) -> None:
        """Set each model's mean and scale from raw activations, those of all ranks together.

        Each rank gives as many. It is no matter of one rank's first batch that the others take over: the first
        training step may fit them too, when `DistributedDataParallel` has long made the ranks alike.

        Raises:
            ValueError: A model's activations have no scale: they are not finite, all alike, or too large or small for float32.
        """
        target = self.cfg.d_in / 2
        acts = acts.float()
        for i, (model, inputs) in enumerate(self.partition.models.items()):
            x = acts[:, inputs]
            mean = ranks.mean_of_rows(x)
            least = mean.new_zeros(())
            if self.cfg.normalization == "variance":
                self.input_mean[inputs] = mean
                power = ranks.mean_of_rows((x - mean).pow(2).sum(dim=-1))
                least = (ROUNDING * mean.norm()).pow(2)
            elif self.cfg.normalization == "median_norm":
                power = ranks.gathered(x.norm(dim=-1)).median().pow(2)
            else:
                power = x.new_tensor(target)
            if not (least < power < torch.inf and mean.isfinite().all()):
                raise ValueError(_no_scale(model, power.item(), ranks.n_rows(x)))
            self.input_scale[i] = math.sqrt(target) / power.sqrt()
        self._is_fitted = True
        self.b_dec.data = ranks.mean_of_rows(self._normalize(acts)).to(self.dtype)

    @property
    def is_normalization_fitted(self) -> bool:
        # Once it is, nobody has to wait for a GPU's answer again.
        self._is_fitted = self._is_fitted or bool((self.input_scale > 0).all())
        return self._is_fitted

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._is_fitted = False
        self.W_enc.data = latents_together(self.W_enc.data)
        return result

    def _scale_of_each(self) -> Float[Tensor, "2"]:
        return torch.where(self.input_scale > 0, self.input_scale, 1.0)

    def _scales(self) -> Float[Tensor, " d_in"]:
        a, b = self._scale_of_each().split(1)
        return torch.cat([a.expand(self.cfg.d_a), b.expand(self.cfg.d_b)])

    def _normalize(self, acts: Tensor) -> Tensor:
        return ((acts - self.input_mean) * self._scales()).to(self.dtype)

    def _denormalize(self, acts: Tensor) -> Tensor:
        return acts / self._scales() + self.input_mean

    @override
    def _setup_activation_normalization(self) -> None:
        self.run_time_activation_norm_fn_in = self._normalize
        self.run_time_activation_norm_fn_out = self._denormalize

    # --- encode and decode ---

    def competing_norms(self) -> Float[Tensor, " d_sae"]:
        """The factor that puts a latent's activation in the units in which latents compete."""
        norms = decoder_norms(self.decoder(), self.partition)
        joined = norms.sum(dim=0) if self.cfg.decoder_norm == "sum" else norms.norm(dim=0)
        return joined.clamp(min=MIN_DECODER_NORM)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """Feature activations and scores, both in units of one decoder norm."""
        return self._encode_normalized(self._normalize(self.hook_sae_input(x.to(self.dtype))))

    def _encode_normalized(self, acts: Tensor) -> tuple[Tensor, Tensor]:
        # Through the rows, the bias's gradient would cost a product of its own: it goes through a row of zeros instead.
        b_dec = self.b_dec.detach()
        bias = self.b_enc - encode_blocks(self.b_dec - b_dec, self.W_enc, self.partition)
        pre = encode_blocks(acts - b_dec, self.W_enc, self.partition) + bias
        scores = self.hook_sae_acts_pre(pre) * self.competing_norms()
        if self.training:
            feature_acts = self.select(scores)
        else:
            feature_acts = scores.relu() * (scores > self.latent_thresholds())
        return self.hook_sae_acts_post(feature_acts), scores

    def _decode_normalized(self, feature_acts: Tensor) -> Tensor:
        feature_acts = feature_acts / self.competing_norms()
        return decode_blocks(feature_acts, self.decoder(), self.partition) + self.b_dec

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of the raw activations."""
        reconstruction = self.hook_sae_recons(self._decode_normalized(feature_acts))
        return self.run_time_activation_norm_fn_out(reconstruction)

    # --- training ---

    def check_batch(self, n_rows: int) -> None:
        """Refuse a size of batches, that of all ranks together, with which it could not train.

        Raises:
            ValueError: Some latents would never fire.
        """

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses, each model's own, on the normalised activations."""
        if not self.is_normalization_fitted:
            self.fit_normalization(step_input.sae_in)
        acts = self._normalize(self.hook_sae_input(step_input.sae_in.to(self.dtype)))
        return self._step(replace(step_input, sae_in=acts))

    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """A step on activations that are normalised."""
        feature_acts, scores = self._encode_normalized(step_input.sae_in)
        reconstruction = self._decode_normalized(feature_acts)
        losses = self.calculate_aux_loss(step_input, feature_acts, scores, reconstruction)
        return self._step_output(step_input, feature_acts, scores, reconstruction, losses)

    def _step_output(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        scores: Tensor,
        reconstruction: Tensor,
        other_losses: dict[str, Tensor],
    ) -> TrainStepOutput:
        acts = step_input.sae_in
        losses = reconstruction_losses(acts, reconstruction, self.partition) | other_losses
        is_logged = step_input.is_logging_step
        return TrainStepOutput(
            sae_in=acts,
            sae_out=reconstruction,
            feature_acts=feature_acts,
            hidden_pre=scores,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=self._step_metrics(acts, reconstruction, feature_acts) if is_logged else {},
        )

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """What is added to the reconstruction losses: here the dead-latent loss.

        The step's input and `sae_out` are normalised activations and their reconstruction.
        """
        n_dead, dead = self._n_dead(step_input), step_input.dead_neuron_mask
        if n_dead is None or dead is None:
            return {}
        if n_dead == 0:
            return {DEAD: sae_out.new_zeros(())}
        W_dec = self.decoder() / self.competing_norms()[:, None]
        decoded = dead_latents_decoded(hidden_pre, W_dec, dead, self.partition, self.k_aux)
        return {DEAD: self._dead_loss(step_input.sae_in - sae_out, decoded, n_dead)}

    def _n_dead(self, step_input: TrainStepInput) -> int | None:
        """How many latents are dead; none when they have no loss."""
        if step_input.dead_neuron_mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        if isinstance(step_input, CountedStepInput):
            return step_input.n_dead
        return int(step_input.dead_neuron_mask.sum())

    @property
    def k_aux(self) -> int:
        """Dead latents that rebuild a pair's residual."""
        return self.cfg.k_aux or max(1, self.cfg.d_in // 4)

    def _dead_loss(self, residual: Tensor, decoded: Tensor, n_dead: int) -> Tensor:
        loss = dead_latent_loss(residual.detach(), decoded, n_dead, self.k_aux)
        return self.cfg.aux_loss_coefficient * loss

    @torch.no_grad()
    def _step_metrics(
        self, acts: Tensor, reconstruction: Tensor, feature_acts: Tensor
    ) -> dict[str, Any]:
        explained = explained_variances(acts, reconstruction, self.partition)
        metrics = {f"explained_variance/{model}": value for model, value in explained.items()}
        counts = firing_counts(feature_acts)
        for name, latents in self.partition.slices.items():
            metrics[f"l0/{name}"] = counts[latents].sum() / len(feature_acts)
        return metrics

    # --- saving ---

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_state(self) -> dict[str, Tensor]:
        """What training needs to go on besides parameters and buffers, on this rank."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `training_state` gave."""

    @torch.no_grad()
    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Replace the training state by the weights of a `Crosscoder` on raw activations.

        Decoder norms are folded first and the models' scales after, so that the scores, and with
        them the selection, do not change.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        norms, scales = self.competing_norms(), self._scales()
        W_enc = self.W_enc * norms * scales[:, None]
        W_dec = self.decoder() / norms[:, None] / scales
        zero_forbidden_(W_enc, W_dec, self.partition)
        state_dict.clear()
        state_dict["W_enc"] = W_enc.to(self.dtype).contiguous()
        state_dict["b_enc"] = (self.b_enc * norms).to(self.dtype)
        state_dict["W_dec"] = W_dec.to(self.dtype).contiguous()
        state_dict["b_dec"] = self._denormalize(self.b_dec).to(self.dtype)
        state_dict["threshold"] = self.latent_thresholds().contiguous()
        state_dict["input_scale"] = self._scale_of_each().to(self.dtype)
        # A threshold that is infinite says that the latent never fires.
        broken = [n for n, x in state_dict.items() if n != "threshold" and not x.isfinite().all()]
        if broken or state_dict["threshold"].isnan().any():
            raise ValueError(
                f"This crosscoder has NaN or infinity in {', '.join(broken) or 'threshold'}, so it says nothing and is not "
                "saved: its training diverged. Train again with a lower lr or a longer warm-up."
            )

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write the saved form; its sizes are the crosscoder's, which may have left its configuration's behind."""
        return self.to_inference().save_model(path)

    @torch.no_grad()
    def to_inference(self) -> Crosscoder:
        """The crosscoder that `save_inference_model` writes."""
        cfg = self.cfg.get_inference_sae_cfg_dict()
        cfg["n_a_exclusive"], cfg["n_b_exclusive"] = (
            self.partition.n_a_exclusive,
            self.partition.n_b_exclusive,
        )
        crosscoder = Crosscoder(CrosscoderConfig.from_dict(cfg))
        state_dict = self.state_dict()
        self.process_state_dict_for_saving_inference(state_dict)
        crosscoder.load_state_dict(state_dict)
        return crosscoder.to(self.device)
