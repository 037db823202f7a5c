"""Computes a training's time, memory and disk space from its settings and a few measured numbers."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sae_lens.util import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.training.checkpoint import KEPT
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

COPIES_IN_TRAINING = 4
"""Copies of a crosscoder's weights in memory: the weights, their gradient, and Adam's two
moments."""
COPIES_IN_CHECKPOINT = 3
"""Copies in a checkpoint: the same without the gradient."""
COPIES_OF_BUFFER = 2.5
"""Peak memory of the shuffle while it fills, in buffers: the old buffer, the new rows, and both
concatenated."""
BYTES_OF_ROW_VALUE = torch.float32.itemsize
BYTES_OF_CACHED_VALUE = torch.bfloat16.itemsize


@dataclass(frozen=True)
class Speed:
    """Speeds measured on a few batches."""

    reading: float
    """Pairs tokenized and aligned per second."""
    harvest: float
    """Pairs of both models' activations computed per second."""
    step: float
    """Seconds per training step, for all crosscoders together."""


class Times(NamedTuple):
    """Seconds that a training takes, by activity."""

    reading: float
    """Tokenizing and aligning text."""
    harvest: float
    """Running the models."""
    steps: float
    """Training steps, without the time that overlaps with the models' forward passes on another
    device."""

    @property
    def total(self) -> float:
        return sum(self)


class Memory(NamedTuple):
    """Peak memory of a training on one device, in bytes, by use."""

    opening: float
    """Peak while the models are opened, before anything else is in memory."""
    models: float
    """The models while they run a batch; on the CPU also the process itself."""
    crosscoder: float
    """Weights, gradients, Adam's moments, and the temporary memory of a step."""
    rows: float
    """Activations that are shuffled, or kept for another pass."""

    @property
    def total(self) -> float:
        return max(self.opening, self.models + self.crosscoder + self.rows)


class Harvest(NamedTuple):
    """How much the models must run."""

    pairs: int
    """Pairs of activations that they compute."""
    fills: int
    """How often the shuffle's buffer is filled."""


def harvest_of(cfg: CrosscoderRunnerConfig, of_a_pass: float | None = None) -> Harvest:
    """Count the pairs that the models compute in a training, including those for normalization and
    those that are prefetched.

    The shuffle fills its buffer, hands out the part that it does not keep for mixing, and fills the
    buffer again.

    Args:
        cfg: The training.
        of_a_pass: Distinct pairs of the text; if pairs are kept in memory, no more than these are
            computed.
    """
    batch, ahead = cfg.train_batch_size_tokens, cfg.prefetch_llm_batches
    size = cfg.n_batches_in_buffer * batch
    n_batches = cfg.n_batches_for_norm_estimate + cfg.training_steps + (ahead + 1 if ahead else 0)
    of_a_fill = max(1, (size - int(size * cfg.activations_mixing_fraction)) // batch)
    fills = -(-n_batches // of_a_fill)
    pairs = size + (fills - 1) * of_a_fill * batch
    if cfg.keep_in_memory and of_a_pass is not None:
        pairs = min(pairs, int(of_a_pass))
    return Harvest(pairs, fills)


def times(cfg: CrosscoderRunnerConfig, speed: Speed, of_a_pass: float | None = None) -> Times:
    """Estimate how long a training takes once its models and text are open, without writing
    checkpoints and measuring for W&B.

    While the buffer is filled, the crosscoder trains on the few prefetched batches and then waits,
    so the times add up. If models and crosscoder share a device, or the CPU's cores, running both
    at once would cost as much time as it saves.

    Args:
        cfg: The training.
        speed: What was measured.
        of_a_pass: As in `harvest_of`.
    """
    harvest = harvest_of(cfg, of_a_pass)
    hidden = 0.0
    if cfg.prefetch_llm_batches and _is_apart(cfg):
        of_a_fill = harvest.pairs / harvest.fills / speed.harvest
        hidden = harvest.fills * min((cfg.prefetch_llm_batches + 1) * speed.step, of_a_fill)
    return Times(
        reading=harvest.pairs / speed.reading,
        harvest=harvest.pairs / speed.harvest,
        steps=max(0.0, cfg.training_steps * speed.step - hidden),
    )


def _is_apart(cfg: CrosscoderRunnerConfig) -> bool:
    """Whether the crosscoder has a device of its own."""
    own, *models = (
        (device.partition(":")[0], device.partition(":")[2] or "0")
        for device in (cfg.device, cfg.model_a.device, cfg.model_b.device)
    )
    return own not in models


def weights_of(sae: CrosscoderTrainingConfig, d_in: int) -> int:
    """Bytes of a crosscoder's weights: encoder, decoder and their biases."""
    n_weights = 2 * d_in * sae.d_sae + sae.d_sae + d_in
    return n_weights * str_to_dtype(sae.dtype).itemsize


def crosscoder_memory(cfg: CrosscoderRunnerConfig, d_in: int) -> int:
    """Minimum memory for training these crosscoders, in bytes."""
    return COPIES_IN_TRAINING * sum(weights_of(sae, d_in) for sae in cfg.all_saes)


def rows_memory(cfg: CrosscoderRunnerConfig, d_in: int, of_a_pass: float | None = None) -> float:
    """Peak memory of the activations that a training holds, in bytes."""
    size = cfg.n_batches_in_buffer * cfg.train_batch_size_tokens
    kept = harvest_of(cfg, of_a_pass).pairs if cfg.keep_in_memory else 0
    return (COPIES_OF_BUFFER * size + kept) * d_in * BYTES_OF_ROW_VALUE


def checkpoint_size(cfg: CrosscoderRunnerConfig, d_in: int) -> int:
    """Bytes of a checkpoint at its largest: weights, Adam's moments, and the shuffle's buffer."""
    weights = sum(weights_of(sae, d_in) for sae in cfg.all_saes)
    size = cfg.n_batches_in_buffer * cfg.train_batch_size_tokens
    return COPIES_IN_CHECKPOINT * weights + size * d_in * BYTES_OF_ROW_VALUE


@dataclass(frozen=True)
class Disk:
    """Bytes that a training writes."""

    run: int
    """The output folder."""
    checkpoints: int
    """The checkpoints that are kept, and the one that is being written."""
    cache: int
    """Size of a cache of the same pairs by `sae-lens-dfc cache`; training itself writes no
    cache."""

    @property
    def total(self) -> int:
        """Bytes that must be free for the training."""
        return self.run + self.checkpoints


def disk(cfg: CrosscoderRunnerConfig, d_in: int, of_a_pass: float | None = None) -> Disk:
    """Estimate what a training writes, and what a cache of its activations would take."""
    pairs = harvest_of(cfg).pairs if of_a_pass is None else of_a_pass
    n_checkpoints = min(cfg.n_checkpoints, KEPT + 1)
    return Disk(
        run=sum(weights_of(sae, d_in) for sae in cfg.all_saes) if cfg.output_path else 0,
        checkpoints=n_checkpoints * checkpoint_size(cfg, d_in),
        cache=int(min(pairs, harvest_of(cfg).pairs) * d_in * BYTES_OF_CACHED_VALUE),
    )


def size(n_bytes: float) -> str:
    """Format a number of bytes for people.

    >>> size(4_290_000_000), size(12)
    ('4.29 GB', '12.0 B')
    """
    text = tqdm.format_sizeof(n_bytes)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float) -> str:
    """Format a number of seconds for people.

    >>> [duration(s) for s in (0.25, 42, 600, 30_000)]
    ['0.25 s', '42 s', '10 min', '8 h 20 min']
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
