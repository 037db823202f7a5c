"""SAELens' trainers for one or several crosscoders on one data stream, with exactly resumable
checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import MultiHookDataProvider
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.interrupts import Interrupted
from sae_lens_dfc.crosscoders.base import CountedStepInput, TrainingCrosscoder
from sae_lens_dfc.crosscoders.sparse_path import firing_counts
from sae_lens_dfc.data.batches import Batches
from sae_lens_dfc.metrics.evaluate import HeldOutEvaluator
from sae_lens_dfc.training.checkpoint import load_checkpoint, save_checkpoint

NEVER = 2**62

# SAELens routes batches to crosscoders by hook name; here all crosscoders take the same batches.
PAIR = "pair"


class CrosscoderSAETrainer(SAETrainer[TrainingCrosscoder[Any], Any]):
    """SAELens' `SAETrainer` with a faster training step.

    Results are the same: Adam runs as one fused kernel, and firing is counted from the indices of
    active latents. The GPU is synchronized only to read the number of dead latents, as of the last
    step's forward pass. Counts are over all ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if torch.device(self.cfg.device).type in ("cpu", "cuda"):
            for group in self.optimizer.param_groups:
                group["fused"] = True
        self._dead_count: _DeadCount | None = None
        self._not_finite = FirstNotFinite(self.cfg.device)

    @override
    def _train_step(self, sae: TrainingCrosscoder[Any], sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        step_input = CountedStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            n_dead=self._n_dead(),
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(step_input)
        self._count(output.feature_acts)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        # A finite loss may have a non-finite gradient.
        self._not_finite.see(output.loss.detach() + norm, self.n_training_steps)
        with contiguous_for_fused_adam(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        # Detach, or the losses would keep the autograd graph in memory until the next step.
        losses = {name: torch.as_tensor(loss).detach() for name, loss in output.losses.items()}
        return replace(
            output, loss=output.loss.detach(), sae_out=output.sae_out.detach(), losses=losses
        )

    def check_finite(self, name: str) -> None:
        """Check that the training has not diverged. Synchronizes the GPU; all ranks must call it.

        Raises:
            ValueError: The loss or a weight is NaN or infinite.
        """
        step = self._not_finite.step()
        if step is None and is_finite(self.sae):
            return
        when = self.n_training_steps if step is None else step
        raise ValueError(
            f"Training diverged: at step {when} the loss or the weights of {name} became NaN or infinite "
            f"(lr={self.cfg.lr:g} after {self.cfg.lr_warm_up_steps} steps of warm-up). Its weights are not saved; checkpoints of "
            "earlier steps stay. Lower lr or lengthen lr_warm_up_steps, and see that no activation is huge (outlier_factor)."
        )

    @torch.no_grad()
    def _count(self, feature_acts: Tensor) -> None:
        counts = distributed.all_reduce_sum(firing_counts(feature_acts))
        self.act_freq_scores += counts
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(counts > 0, 0)
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.n_training_samples += (distributed.world_size() - 1) * len(feature_acts)
        passes = self.n_forward_passes_since_fired
        self._dead_count = _DeadCount(passes, passes._version, read_later(self.dead_neurons.sum()))

    def _n_dead(self) -> int:
        """Number of dead latents, from the copy started after the last step unless the counters
        have changed since."""
        last, passes = self._dead_count, self.n_forward_passes_since_fired
        if last is None or last.passes is not passes or last.version != passes._version:
            return int(self.dead_neurons.sum())
        return last.value()


class _DeadCount(NamedTuple):
    passes: Tensor
    version: int
    value: Callable[[], int]


def read_later(x: Int[Tensor, ""]) -> Callable[[], int]:
    """Start an asynchronous copy of a number from the GPU; the returned function waits for it and
    returns it.

    >>> read_later(torch.tensor(3))()
    3
    """
    if not x.is_cuda:
        return lambda: int(x)
    here = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    is_here = torch.cuda.Event()
    is_here.record(torch.cuda.current_stream(x.device))

    def number() -> int:
        is_here.synchronize()
        return int(here)

    return number


def on_device(batch: Float[Tensor, "batch d_in"], device: str) -> Float[Tensor, "batch d_in"]:
    """The batch on a device; copied to a GPU asynchronously."""
    if torch.device(device).type != "cuda" or batch.is_cuda:
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


@contextmanager
def contiguous_for_fused_adam(optimizer: Optimizer) -> Iterator[None]:
    """Context in which parameters stored as transposes are transposed, with their gradients and
    moments.

    Torch's fused Adam on a CPU copies non-contiguous tensors, which takes longer than the step. If
    a parameter and its moments differ in memory layout, it silently computes wrong results, so
    moments are copied into the parameter's layout.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    transposed = [p for p in parameters if p.ndim == 2 and not p.is_contiguous()]
    for p in parameters:
        moments = optimizer.state.get(p, {})
        for name, x in moments.items():
            if x.shape == p.shape and x.stride() != p.stride():
                moments[name] = torch.empty_like(p).copy_(x)
    _transpose(transposed, optimizer)
    try:
        yield
    finally:
        _transpose(transposed, optimizer)


def _transpose(parameters: list[Tensor], optimizer: Optimizer) -> None:
    for p in parameters:
        grad, p.grad = p.grad, None
        p.data = p.data.T
        p.grad = None if grad is None else grad.T
        moments = optimizer.state.get(p, {})
        for name, x in moments.items():
            moments[name] = x.T if x.ndim == 2 else x


class CrosscoderTrainer(MultiSAETrainer):
    """SAELens' `MultiSAETrainer` in which every crosscoder trains on the same batches.

    Its steps are those of `CrosscoderSAETrainer`. Its checkpoints are its own, since SAELens' are
    pickled, lack the state of the data stream, and are not written atomically.

    Args:
        cfg: SAELens' trainer settings, the same for all crosscoders.
        crosscoders: The crosscoders by name.
        batches: Batches of raw activations.
        checkpoint_values: Returns further values to store in a checkpoint.
        evaluator: Evaluates on held-out pairs, at SAELens' intervals.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        crosscoders: Mapping[str, TrainingCrosscoder[Any]],
        batches: Batches,
        checkpoint_values: Callable[[], Mapping[str, Any]],
        evaluator: HeldOutEvaluator | None = None,
    ):
        super().__init__(
            cfg,
            saes=dict(crosscoders),
            hook_names=dict.fromkeys(crosscoders, PAIR),
            data_provider=({PAIR: on_device(batch, cfg.device)} for batch in batches),
            evaluator=None if evaluator is None else _of_each(evaluator),
        )
        # Replace the trainers that SAELens created.
        self.trainers = {
            name: CrosscoderSAETrainer(one.cfg, one.sae, iter(()))
            for name, one in self.trainers.items()
        }
        self.batches = batches
        self.checkpoint_values = checkpoint_values

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end.

        Raises:
            ValueError: The training diverged.
            Interrupted: A signal stopped it; a checkpoint is saved if `checkpoint_path` is set.
        """
        try:
            crosscoders = super().fit()
        except Interrupted as stopped:
            raise Interrupted(stopped.number, self._stopped_at()) from None
        self._check_finite()
        return crosscoders

    def _stopped_at(self) -> str:
        at = f"stopped after {self.n_training_samples} samples"
        if self.cfg.checkpoint_path is None:
            return f"{at}; its progress is lost, as no checkpoint_path is set"
        folder = self._save(self.n_training_steps)
        return f"{at}, saved in {folder}: continue with --resume"

    def _check_finite(self) -> None:
        for name, one in self.trainers.items():
            assert isinstance(one, CrosscoderSAETrainer)
            one.check_finite(name)

    @override
    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: Any, update_interval: int = 100
    ) -> None:
        # Showing the loss synchronizes the GPU anyway.
        if self.n_training_steps % update_interval == 0:
            self._check_finite()
        super()._update_pbar(step_outputs, pbar, update_interval)

    @override
    def _checkpoint_if_needed(self) -> None:
        passed = [t for t in self.checkpoint_thresholds if self.n_training_samples > t]
        if passed and self.cfg.checkpoint_path is not None:
            # SAELens increments its step counter after this.
            self._save(self.n_training_steps + 1)
            del self.checkpoint_thresholds[: len(passed)]

    def _save(self, n_training_steps: int) -> Path:
        assert self.cfg.checkpoint_path is not None
        self._check_finite()
        folder = Path(self.cfg.checkpoint_path) / str(self.n_training_samples)
        where, values = self.batches.after, self.checkpoint_values()
        save_checkpoint(folder, self.trainers, n_training_steps, where, values)
        return folder

    def resume(self, folder: Path) -> None:
        """Resume from a checkpoint; the batches must already start at its data stream state.

        Raises:
            ValueError: The checkpoint cannot be read.
        """
        load_checkpoint(folder, self.trainers)
        first = next(iter(self.trainers.values()))
        self.n_training_samples = first.n_training_samples
        self.n_training_steps = first.n_training_steps
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]


def _of_each(evaluator: HeldOutEvaluator) -> Callable[..., dict[str, Any]]:
    def measures(
        saes: dict[str, TrainingSAE[Any]],
        data_provider: MultiHookDataProvider,  # noqa: ARG001
        activation_scalers: dict[str, ActivationScaler],
        hook_names: dict[str, str],  # noqa: ARG001
    ) -> dict[str, Any]:
        return {
            f"{name}/{measure}": value
            for name, sae in saes.items()
            for measure, value in evaluator(sae, iter(()), activation_scalers[name]).items()  # type: ignore[arg-type]
        }

    return measures


class FirstNotFinite:
    """Tracks on the device the first step at which a number was NaN or infinite, without
    synchronizing each step.

    >>> first = FirstNotFinite("cpu")
    >>> for step, loss in enumerate([1.0, float("inf"), float("nan")]):
    ...     first.see(torch.tensor(loss), step)
    >>> first.step()
    1
    """

    def __init__(self, device: torch.device | str):
        self._step: Int[Tensor, ""] = torch.full((), NEVER, device=device)

    @torch.no_grad()
    def see(self, x: Float[Tensor, ""], step: int) -> None:
        """Record the number of a step, without synchronizing."""
        self._step = torch.where(x.isfinite(), self._step, self._step.clamp(max=step))

    def step(self) -> int | None:
        """The first such step on any rank; none if there was none. Synchronizes; all ranks must
        call it."""
        step = int(distributed.all_reduce_min(self._step))
        return None if step == NEVER else step


@torch.no_grad()
def is_finite(model: nn.Module) -> bool:
    """Whether all weights are finite.

    >>> is_finite(nn.Linear(2, 3))
    True
    """
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())
