"""Runs SAELens' trainer data-parallel over several ranks, averaging gradients."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from sae_lens_dfc.core import distributed
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer


def for_this_rank(cfg: SAETrainerConfig) -> SAETrainerConfig:
    """The trainer's settings on this rank: those of the whole training, except that only rank 0
    logs.

    `train_batch_size_samples` and `total_training_samples` remain totals over all ranks, so that
    schedules, firing rates and recorded settings equal those of one process.

    >>> cfg = SAETrainerConfig(total_training_samples=4096, train_batch_size_samples=64)
    >>> for_this_rank(cfg) is cfg  # a single process
    True

    Raises:
        ValueError: The batch size is not a multiple of the number of ranks.
    """
    batch, n = cfg.train_batch_size_samples, distributed.world_size()
    if batch % n != 0:
        raise ValueError(
            f"train_batch_size_samples={batch} does not divide into {n} processes: the mean of their gradients would "
            "not be the batch's. Set it to a multiple."
        )
    if distributed.rank() == 0:
        return cfg
    return replace(cfg, logger=replace(cfg.logger, log_to_wandb=False))


@contextmanager
def data_parallel(trainer: SAETrainer[Any, Any]) -> Iterator[None]:
    """Context in which each of the trainer's steps is one data-parallel step over the batches of
    all ranks.

    The crosscoder object is unchanged; only its `training_forward_pass` is routed through
    `DistributedDataParallel`. Its weights are broadcast from rank 0. Buffers are not broadcast:
    they are computed from all-reduced values, and broadcasting would hide a divergence between
    ranks. In a single process nothing changes.

    Raises:
        ValueError: The trainer is not a `CrosscoderSAETrainer`, which counts firing over all ranks;
            or, on a step, the batch is not this rank's share of `train_batch_size_samples`.
    """
    if distributed.world_size() == 1:
        yield
        return
    if not isinstance(trainer, CrosscoderSAETrainer):
        raise ValueError(
            f"A {type(trainer).__name__} counts the firing of its own rank only. Use CrosscoderSAETrainer."
        )
    crosscoder = trainer.sae.to(trainer.cfg.device)
    step = _Step(crosscoder.training_forward_pass, crosscoder.parameters())
    # Gradients as views of the buckets: copies would take a quarter more memory.
    parallel = DistributedDataParallel(step, gradient_as_bucket_view=True)

    def training_forward_pass(step_input: TrainStepInput) -> TrainStepOutput:
        _check_share(trainer, step_input.sae_in)
        return parallel(step_input)

    crosscoder.training_forward_pass = training_forward_pass
    try:
        yield
    finally:
        del crosscoder.training_forward_pass


class _Step(nn.Module):
    """A training step wrapped as a module's forward for `DistributedDataParallel`, with parameters
    but no buffers."""

    def __init__(
        self,
        forward_pass: Callable[[TrainStepInput], TrainStepOutput],
        parameters: Iterable[nn.Parameter],
    ):
        super().__init__()
        self.forward_pass = forward_pass
        self.shared = nn.ParameterList(parameters)

    @override
    def forward(self, step_input: TrainStepInput) -> TrainStepOutput:
        return self.forward_pass(step_input)


def _check_share(trainer: SAETrainer[Any, Any], batch: Tensor) -> None:
    n, whole = distributed.world_size(), trainer.cfg.train_batch_size_samples
    if len(batch) * n != whole:
        raise ValueError(
            f"Rank {distributed.rank()} got a batch of {len(batch)}, but {n} processes share "
            f"train_batch_size_samples={whole}. Make batches of {whole // n} on each."
        )
