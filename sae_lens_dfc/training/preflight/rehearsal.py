"""Times a few batches of a training: the models on real text, and the crosscoder's trainer on their
activations."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from itertools import cycle, islice
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts, bucketed
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.preflight.peak_memory import with_peak_memory
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

FEW_STEPS, MOST_STEPS = 4, 60
# The first batch and step include one-time setup.
WARM_UP = 1


class Harvested(NamedTuple):
    """Activations of both models on a few batches of contexts, with speed and memory."""

    acts: Tensor
    rate: float
    """Pairs per second."""
    usable: float
    """Share of the pairs that training can use: not at position 0, not an outlier, and finite."""
    memory: int | None
    """Largest growth of the process's memory, in bytes; none if the system does not say."""


class Stepped(NamedTuple):
    """Time and memory of a few training steps."""

    seconds: float
    """Seconds per step."""
    memory: int | None
    """Largest growth of the device's memory, in bytes; none if the system does not say."""


def harvested(
    pair: ModelPair, cfg: CrosscoderRunnerConfig, contexts: Sequence[Context], seconds: float
) -> Harvested:
    """Run both models on these contexts repeatedly, for about the given time.

    Args:
        pair: The two models.
        cfg: How large the batches are.
        contexts: Part of the text, at least one context.
        seconds: How long to run; two batches are always run, however long they take.

    Raises:
        ValueError: None of the pairs can be used.
    """
    longest, size = cfg.context_size, cfg.store_batch_size_prompts
    batches = [ContextBatch(batch, {}) for batch in bucketed(contexts, size, longest, seed="")]
    counts = PairCounts()
    rows = paired_activations(pair, cycle(batches), counts, cfg.outlier_factor)
    (acts, rate), memory = with_peak_memory(lambda: _timed(rows, seconds), torch.device("cpu"))
    if len(acts) == 0:
        raise ValueError(
            "The first documents have no pair after position 0, which is left out. Give longer documents."
        )
    left_out = counts.first_position + counts.outlier + counts.not_finite
    return Harvested(acts, rate, counts.pairs / max(1, counts.pairs + left_out), memory)


def _timed(batches: Iterator[PairedRows], seconds: float) -> tuple[Tensor, float]:
    """The rows of some batches, and the pairs per second."""
    found: list[Tensor] = []
    ends = [time.perf_counter()]
    while len(found) <= WARM_UP or ends[-1] - ends[WARM_UP] < seconds:
        # The copy to the CPU synchronizes the GPU.
        found.append(next(batches).acts.cpu())
        ends.append(time.perf_counter())
    n_pairs = sum(map(len, found[WARM_UP:]))
    return torch.cat(found), n_pairs / (ends[-1] - ends[WARM_UP])


def stepped(pair: ModelPair, cfg: CrosscoderRunnerConfig, acts: Tensor, seconds: float) -> Stepped:
    """Train new crosscoders with these settings on these activations, for about the given time.

    Args:
        pair: The two models, which are not run.
        cfg: The training; nothing is written.
        acts: Rows of activations, at least one; if there are too few for a batch, they are
            repeated.
        seconds: How long to train; a few steps are always made, however long they take.
    """
    few, memory = with_peak_memory(
        lambda: _step_seconds(pair, cfg, acts, FEW_STEPS), torch.device(cfg.device)
    )
    n_more = min(MOST_STEPS, int(seconds / few))
    if n_more > FEW_STEPS:
        few = _step_seconds(pair, cfg, acts, n_more)
    return Stepped(few, memory)


def _step_seconds(
    pair: ModelPair, cfg: CrosscoderRunnerConfig, acts: Tensor, n_steps: int
) -> float:
    short = rehearsed(cfg, n_steps)
    # The first batch fits the normalization. Two consecutive requests are one step apart.
    batches = _Watched(_batches(acts, cfg.train_batch_size_tokens, n_steps + 1))
    with _quiet():
        CrosscoderTrainingRunner(short, pair, batches).run_all()
    asked = batches.asked[1 + WARM_UP :]
    return (asked[-1] - asked[0]) / (len(asked) - 1)


def _batches(acts: Tensor, size: int, n: int) -> list[PairedRows]:
    wanted = acts.repeat(-(-size // len(acts)), 1)
    different = wanted[: len(wanted) // size * size].split(size)
    no_origin = torch.zeros(size, dtype=torch.long)
    return [PairedRows(batch, no_origin, no_origin) for batch in islice(cycle(different), n)]


class _Watched(Sequence[PairedRows]):
    """Batches that record when each was requested in the last pass."""

    def __init__(self, batches: Sequence[PairedRows]):
        self._batches = batches
        self.asked: list[float] = []

    @override
    def __iter__(self) -> Iterator[PairedRows]:
        self.asked = []
        for batch in self._batches:
            self.asked.append(time.perf_counter())
            yield batch

    @override
    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> PairedRows: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PairedRows]: ...
    @override
    def __getitem__(self, index: int | slice) -> PairedRows | Sequence[PairedRows]:
        return self._batches[index]


def rehearsed(cfg: CrosscoderRunnerConfig, n_steps: int) -> CrosscoderRunnerConfig:
    """Settings for a training of `n_steps` steps that takes batches in order, without a shuffle,
    and writes nothing."""
    return replace(
        cfg.without_output(),
        sae=_of_most_steps(cfg.sae),
        other_saes=[_of_most_steps(sae) for sae in cfg.other_saes],
        reassign_at=[],
        training_tokens=n_steps * cfg.train_batch_size_tokens,
        n_batches_in_buffer=1,
        activations_mixing_fraction=0.0,
        prefetch_llm_batches=0,
        n_batches_for_norm_estimate=1,
        # Tiny, so that training cannot diverge.
        lr=1e-9,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=cfg.to_sae_trainer_config().dead_feature_window,
    )


def _of_most_steps(sae: CrosscoderTrainingConfig) -> CrosscoderTrainingConfig:
    """The crosscoder as in most steps: final `k`, and no exclusivity test."""
    changes: dict[str, Any] = {}
    if isinstance(sae, TopKTrainingCrosscoderConfig):
        changes |= {"k_initial": None, "k_anneal_steps": 0}
    if isinstance(sae, DFCTrainingCrosscoderConfig):
        changes |= {"reassign_steps": []}
    return replace(sae, **changes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and log lines of a training."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)
