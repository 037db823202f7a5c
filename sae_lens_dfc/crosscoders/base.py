"""Base class of training crosscoders: normalization of each model, encode, select, decode, losses,
and folding into the saved form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from jaxtyping import Float
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_dfc.core import distributed
from sae_lens_dfc.crosscoders.config import T_CONFIG
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
from sae_lens_dfc.crosscoders.sparse_path import firing_counts

# A latent whose decoder vanished must not make the scores NaN.
MIN_DECODER_NORM = 1e-8
# Variation below this share of the mean's norm may be float32 rounding error.
DECODER_TOLERANCE = 1e-6
# SAELens' name for the dead latents' loss.
DEAD = "auxiliary_reconstruction_loss"
# Key of the reconstruction by all selected latents.
WHOLE = "whole"


class PartialLoss(NamedTuple):
    """A loss on the reconstruction by some of the latents alone, with the decoder bias."""

    latents: slice
    loss: Callable[[Tensor, Tensor], Tensor]
    """Takes normalized activations and that reconstruction of them."""


class StepActs(NamedTuple):
    """The activations and reconstructions of a training step, before its losses."""

    feature_acts: Float[Tensor, "batch d_sae"]
    """In units of one decoder norm; a sparse tensor on the sparse path."""
    scores: Float[Tensor, "batch d_sae"]
    """Pre-activations in the same units; on the sparse path, those of the selected latents only."""
    decoded: dict[str, Float[Tensor, "batch d_in"]]
    """Decoded activations without the bias: of all latents (`WHOLE`), of the dead ones (`DEAD`),
    and of those of each partial loss."""


Step = Callable[[Tensor, Tensor | None, int], StepActs]
"""Computes a step from normalized activations, the mask of dead latents (none if they have no loss)
and the number of dead latents."""


def latents_together(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same encoder, stored as its transpose: each latent's weights are contiguous, as in their
    gradient.

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
    """A training step's input with the number of dead latents already counted, which avoids a GPU
    synchronization."""

    n_dead: int
    """Number of latents that `dead_neuron_mask` marks."""


class TrainingCrosscoder(TrainingSAE[T_CONFIG], Generic[T_CONFIG], ABC):
    """A SAELens `TrainingSAE` on both models' activations, concatenated on the last axis, `(batch,
    d_a + d_b)`.

    It takes raw activations. During training it keeps one mean and one scale per model, fitted by
    `fit_normalization` or on the first batch; `save_inference_model` folds them into the weights of
    the inference form. In eval mode, latents are selected by the thresholds that the inference form
    uses. `W_enc` is stored as its transpose, so make it contiguous before you save the state dict
    with safetensors, as `save_model` does.
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
        """In training, the scores of the latents that fire, and 0 for the others."""

    @abstractmethod
    def latent_thresholds(self) -> Float[Tensor, " d_sae"]:
        """After training, the score above which each latent fires."""

    def decoder(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder in use; an architecture with tied weights overrides this."""
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
        """Fit each model's mean and scale to raw activations, over all ranks.

        All ranks must pass equally many rows. Every rank computes the same values, because the
        first training step may fit them too, after `DistributedDataParallel` has already
        synchronized the ranks.

        Raises:
            ValueError: A model's activations have no scale: they are not finite, all equal, or too
                large or small for float32.
        """
        target = self.cfg.d_in / 2
        acts = acts.float()
        for i, (model, inputs) in enumerate(self.partition.models.items()):
            x = acts[:, inputs]
            mean = distributed.mean_of_rows(x)
            least = mean.new_zeros(())
            if self.cfg.normalization == "variance":
                self.input_mean[inputs] = mean
                power = distributed.mean_of_rows((x - mean).pow(2).sum(dim=-1))
                least = (DECODER_TOLERANCE * mean.norm()).pow(2)
            elif self.cfg.normalization == "median_norm":
                power = distributed.all_gather(x.norm(dim=-1)).median().pow(2)
            else:
                power = x.new_tensor(target)
            if not (least < power < torch.inf and mean.isfinite().all()):
                raise ValueError(_no_scale(model, power.item(), distributed.n_rows(x)))
            self.input_scale[i] = math.sqrt(target) / power.sqrt()
        self._is_fitted = True
        self.b_dec.data = distributed.mean_of_rows(self._normalize(acts)).to(self.dtype)

    @property
    def is_normalization_fitted(self) -> bool:
        # Remembered, so that later steps do not synchronize the GPU.
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

    def selection_norms(self) -> Float[Tensor, " d_sae"]:
        """The factor that converts each latent's activation to the units in which latents
        compete."""
        norms = decoder_norms(self.decoder(), self.partition)
        joined = norms.sum(dim=0) if self.cfg.decoder_norm == "sum" else norms.norm(dim=0)
        return joined.clamp(min=MIN_DECODER_NORM)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """Feature activations and pre-activation scores, both in units of one decoder norm."""
        return self._encode_normalized(self._normalize(self.hook_sae_input(x.to(self.dtype))))

    def _encode_normalized(self, acts: Tensor) -> tuple[Tensor, Tensor]:
        # The bias's gradient goes through a single row of zeros, which saves the matrix product
        # that it would cost through the batch.
        b_dec = self.b_dec.detach()
        bias = self.b_enc - encode_blocks(self.b_dec - b_dec, self.W_enc, self.partition)
        pre = encode_blocks(acts - b_dec, self.W_enc, self.partition) + bias
        scores = self.hook_sae_acts_pre(pre) * self.selection_norms()
        if self.training:
            feature_acts = self.select(scores)
        else:
            feature_acts = scores.relu() * (scores > self.latent_thresholds())
        return self.hook_sae_acts_post(feature_acts), scores

    def _decode_unbiased(self, feature_acts: Tensor) -> Tensor:
        scaled = feature_acts / self.selection_norms()
        return decode_blocks(scaled, self.decoder(), self.partition)

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of the raw activations."""
        reconstruction = self.hook_sae_recons(self._decode_unbiased(feature_acts) + self.b_dec)
        return self.run_time_activation_norm_fn_out(reconstruction)

    # --- training ---

    def check_batch(self, n_rows: int) -> None:
        """Check that the batch size, over all ranks, is large enough to train.

        Raises:
            ValueError: Some latents would never fire.
        """

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step: normalize, encode, select, decode, losses, metrics.

        Everything is computed on the normalized activations, which are the output's `sae_in`. Each
        model has its own reconstruction loss (arXiv 2602.11729, section 2.2).
        """
        self.before_step(step_input.n_training_steps)
        if not self.is_normalization_fitted:
            self.fit_normalization(step_input.sae_in)
        acts = self._normalize(self.hook_sae_input(step_input.sae_in.to(self.dtype)))
        step_input = replace(step_input, sae_in=acts)
        n_dead = self._n_dead(step_input)
        feature_acts, scores, decoded = self._step_for(acts)(
            acts, step_input.dead_neuron_mask if n_dead else None, n_dead or 0
        )
        reconstruction = decoded[WHOLE] + self.b_dec
        losses = reconstruction_losses(acts, reconstruction, self.partition)
        if n_dead is not None:
            losses[DEAD] = self._dead_loss(acts - reconstruction, decoded.get(DEAD), n_dead)
        for name, part in self.partial_losses().items():
            losses[name] = part.loss(acts, decoded[name] + self.b_dec)
        losses |= self.calculate_aux_loss(step_input, feature_acts, scores, reconstruction)
        output = TrainStepOutput(
            sae_in=acts,
            sae_out=reconstruction,
            feature_acts=feature_acts,
            hidden_pre=scores,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )
        if step_input.is_logging_step:
            output.metrics = self._step_metrics(acts, reconstruction, feature_acts)
        self.after_step(step_input.n_training_steps, output)
        return output

    def before_step(self, step: int) -> None:
        """Hook for architectures: called before each training step."""

    def after_step(self, step: int, output: TrainStepOutput) -> None:
        """Hook for architectures: called after each training step's losses, before the optimizer's
        update."""

    def partial_losses(self) -> dict[str, PartialLoss]:
        """Losses on reconstructions by some of the latents alone, by name."""
        return {}

    def _step_for(self, acts: Tensor) -> Step:  # noqa: ARG002
        """The function that computes the step on these activations."""
        return self._dense_step

    def _dense_step(self, acts: Tensor, dead: Tensor | None, n_dead: int) -> StepActs:  # noqa: ARG002
        """Compute the step with dense matrices."""
        feature_acts, scores = self._encode_normalized(acts)
        decoded = {WHOLE: self._decode_unbiased(feature_acts)}
        if dead is not None:
            W_dec_unit = self.decoder() / self.selection_norms()[:, None]
            decoded[DEAD] = dead_latents_decoded(
                scores, W_dec_unit, dead, self.partition, self.k_aux
            )
        for name, (latents, _) in self.partial_losses().items():
            scaled = (feature_acts / self.selection_norms())[:, latents]
            decoded[name] = scaled @ self.decoder()[latents]
        return StepActs(feature_acts, scores, decoded)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Losses besides reconstruction, by name; architectures may override it.

        `step_input.sae_in` and `sae_out` are normalized activations and their reconstruction.
        """
        return {}

    def _n_dead(self, step_input: TrainStepInput) -> int | None:
        """Number of dead latents; none if they have no loss."""
        if step_input.dead_neuron_mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        if isinstance(step_input, CountedStepInput):
            return step_input.n_dead
        return int(step_input.dead_neuron_mask.sum())

    @property
    def k_aux(self) -> int:
        """Number of dead latents that reconstruct a pair's residual."""
        return self.cfg.k_aux or max(1, self.cfg.d_in // 4)

    def _dead_loss(self, residual: Tensor, decoded: Tensor | None, n_dead: int) -> Tensor:
        if decoded is None:
            return residual.new_zeros(())
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
        """State needed to resume training, besides parameters and buffers, on this rank."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `training_state`."""

    @torch.no_grad()
    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Replace the training weights by those of a `Crosscoder` on raw activations.

        Decoder norms are folded first, then the models' scales, so that the scores and the
        selection do not change.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        norms, scales = self.selection_norms(), self._scales()
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
        # An infinite threshold means that the latent never fires.
        broken = [n for n, x in state_dict.items() if n != "threshold" and not x.isfinite().all()]
        if broken or state_dict["threshold"].isnan().any():
            raise ValueError(
                f"This crosscoder has NaN or infinity in {', '.join(broken) or 'threshold'}, and is not "
                "saved: its training diverged. Train again with a lower lr or a longer warm-up."
            )

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the inference form, with the crosscoder's current partition sizes, which may differ
        from the configuration's."""
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
