"""Benchmarks one training step in isolation, relative to its encoder product and to other
trainers."""

import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.options import StepConfig
from benchmarks.peers.dfc_learning import Reference, load_reference, reference_step
from benchmarks.peers.dictionary_learning import (
    DISTRIBUTION,
    dictionary_learning_step,
    load_dictionary_learning,
    missing,
)
from benchmarks.provenance import commit, provenance
from benchmarks.timing import medians, ranges, timed, write_json_results
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.architectures.dfc import (
    DFCTrainingCrosscoder,
    DFCTrainingCrosscoderConfig,
)
from sae_lens_dfc.models.hooked_model import check_device
from sae_lens_dfc.synthetic import ToyPair, ToyPairConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.preflight.peak_memory import with_peak_memory
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer

logger = logging.getLogger(__name__)

FILENAME = "step.json"
TARGETS = {
    "float32": {
        "ratio_to_encoder_product": "<= 1.9",
        "speedup_over_reference": ">= 4.5",
        "peak_memory_ratio": "<= 1.25",
    },
    "bfloat16": {
        "ratio_to_encoder_product": "<= 1.35",
        "speedup_over_reference": ">= 6.5",
        "peak_memory_ratio": "<= 1.25",
    },
}
# Other trainers, by name of their figure. All but the first are optional.
OTHERS = ("saelens", "reference", "dictionary_learning")
# Steps per round; a round's figure is their median.
STEPS_PER_ROUND = 5
WARM_UP_STEPS = 2
N_BATCHES = 8
MAX_ACTIVE_FEATURES = 512
# More steps than any measurement takes, so that only latents marked as dead are dead.
DEAD_FEATURE_WINDOW = 1_000_000
TRAINING_STEPS = 100_000

Seconds = Callable[[Tensor], float]
"""Trains on a batch or multiplies it, and returns the seconds."""
NextStep = Callable[[Tensor], Any]
"""Trains on a batch, which it may change."""


def run_step_benchmark(cfg: StepConfig, folder: Path, filename: str = FILENAME) -> dict[str, Any]:
    """Run the step benchmark, and write the results to `folder`.

    Each round times everything in turn on the same batches, so that a ratio compares two times of
    one round. A figure is the median over `rounds`; `spread` holds the lowest and highest round.

    Args:
        cfg: Sizes and comparisons.
        folder: Folder for the results.
        filename: File name of the results.

    Raises:
        ValueError: The sizes are inconsistent, the device is not available, the reference is not a
            valid checkout, or the widths differ, which the reference does not support.
    """
    device = _checked_device(cfg)
    _crosscoder_config(cfg)  # raises if the sizes are inconsistent
    other_steps = _other_steps(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with _current(device):
        rounds, peak = _measured(cfg, device, other_steps)
    results = {
        **medians(rounds),
        **{name: None for name in _of_others() if name not in rounds[0]},
        "peak_memory_ratio": None if peak is None else peak / least_memory(cfg),
        "peak_memory_bytes": peak,
        "spread": ranges(rounds),
        "rounds": rounds,
        "targets": targets(cfg),
        "sizes": {name: getattr(cfg, name) for name in ("d_a", "d_b", "d_sae", "k", "batch")},
        "settings": {
            "device": cfg.device,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "dtype": cfg.dtype,
            "rounds": cfg.rounds,
            "steps_per_round": STEPS_PER_ROUND,
            "warm_up_steps": WARM_UP_STEPS,
            "batches": N_BATCHES,
            "toy": asdict(_toy(cfg)),
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        },
        "reference_commit": _reference_commit(cfg),
        **provenance(*([DISTRIBUTION] if "dictionary_learning" in other_steps else [])),
    }
    write_json_results(results, folder / filename)
    return results


def targets(cfg: StepConfig) -> dict[str, str]:
    """Target values on two idle CPU cores, at the default sizes and with more latents.

    >>> targets(StepConfig(d_sae=32768))["ratio_to_encoder_product"], targets(StepConfig(k=7))
    ('<= 1.9', {})
    """
    sizes = (cfg.d_a, cfg.d_b, cfg.k, cfg.batch, cfg.device)
    is_asked = sizes == (512, 512, 32, 1024, "cpu") and cfg.d_sae >= 8192
    return TARGETS[cfg.dtype] if is_asked else {}


def with_ratios(ms: Mapping[str, float]) -> dict[str, float]:
    """Add ratios to a round's times in milliseconds.

    >>> ms = with_ratios({"step_ms": 3.0, "encoder_product_ms": 2.0, "saelens_ms": 12.0})
    >>> ms["ratio_to_encoder_product"], ms["speedup_over_saelens"]
    (1.5, 4.0)
    """
    step = ms["step_ms"]
    others = [name for name in OTHERS if f"{name}_ms" in ms]
    return {
        **ms,
        "ratio_to_encoder_product": step / ms["encoder_product_ms"],
        **{f"speedup_over_{name}": ms[f"{name}_ms"] / step for name in others},
    }


def _of_others() -> list[str]:
    """Names of the figures of optional trainers."""
    return [figure for name in OTHERS[1:] for figure in (f"{name}_ms", f"speedup_over_{name}")]


def least_memory(cfg: StepConfig) -> int:
    """Minimum bytes of a step: weights, their gradients, Adam's two states, and the latents of a
    batch.

    >>> least_memory(StepConfig(d_a=1, d_b=1, d_sae=8, k=1, batch=4))  # 16 + 16 + 8 + 2 weights; 4 x 8 latents
    736
    """
    n_weights = 2 * cfg.d_in * cfg.d_sae + cfg.d_sae + cfg.d_in
    copies = 4
    return (
        copies * torch.float32.itemsize * n_weights
        + torch.bfloat16.itemsize * cfg.batch * cfg.d_sae
    )


# --- targets and checks ---


def _checked_device(cfg: StepConfig) -> torch.device:
    require(cfg, ("d_a", "d_b", "d_sae", "k", "batch", "rounds"))
    if cfg.reference is not None and cfg.d_a != cfg.d_b:
        raise ValueError(
            f"The reference needs models of equal width, got d_a={cfg.d_a} and d_b={cfg.d_b}. "
            "Give both the same, or leave --reference out."
        )
    check_device(cfg.device)
    return torch.device(cfg.device)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _reference_commit(cfg: StepConfig) -> str | None:
    # A copy inside another repository does not have that repository's commit.
    if cfg.reference is None or not (Path(cfg.reference) / ".git").exists():
        return None
    return commit(Path(cfg.reference), ["."])


# --- the batches ---


def _toy(cfg: StepConfig) -> ToyPairConfig:
    toy = ToyPairConfig(d_a=cfg.d_a, d_b=cfg.d_b)
    return replace(toy, active_features=min(cfg.k, MAX_ACTIVE_FEATURES))


def _batches(cfg: StepConfig) -> list[Tensor]:
    """Batches with learnable features, because selecting latents on pure noise has another cost
    than in training."""
    pair = ToyPair(_toy(cfg))
    return [batch.to(cfg.device) for batch in islice(pair.batches(cfg.batch), N_BATCHES)]


# --- the trainers ---


def _crosscoder_config(cfg: StepConfig) -> DFCTrainingCrosscoderConfig:
    product: dict[str, Any] = {} if cfg.dtype == "float32" else {"encoder_product": cfg.dtype}
    return DFCTrainingCrosscoderConfig(
        d_a=cfg.d_a, d_b=cfg.d_b, d_sae=cfg.d_sae, k=cfg.k, device=cfg.device, **product
    )


def _trainer_config(cfg: StepConfig) -> SAETrainerConfig:
    return CrosscoderRunnerConfig(
        sae=_crosscoder_config(cfg),
        training_tokens=TRAINING_STEPS * cfg.batch,
        train_batch_size_tokens=cfg.batch,
        dead_feature_window=DEAD_FEATURE_WINDOW,
        device=cfg.device,
    ).to_sae_trainer_config()


def _ours(cfg: StepConfig) -> SAETrainer[Any, Any]:
    crosscoder = DFCTrainingCrosscoder(_crosscoder_config(cfg))
    return CrosscoderSAETrainer(_trainer_config(cfg), crosscoder, iter(()))


def _saelens(cfg: StepConfig) -> SAETrainer[Any, Any]:
    sae = BatchTopKTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, k=cfg.k, device=cfg.device)
    return SAETrainer(_trainer_config(cfg), BatchTopKTrainingSAE(sae), iter(()))


def _step(trainer: SAETrainer[Any, Any], batch: Tensor) -> None:
    trainer.step(batch)
    trainer.n_training_steps += 1


def _built_and_stepped(cfg: StepConfig, batches: Sequence[Tensor]) -> SAETrainer[Any, Any]:
    trainer = _ours(cfg)
    for batch in batches[:WARM_UP_STEPS]:
        _step(trainer, batch)
        _with_a_tenth_dead(trainer, batch)
    return trainer


def _other_steps(cfg: StepConfig) -> dict[str, Callable[[], NextStep]]:
    """Factories for the optional trainers that are available, by name."""
    steps: dict[str, Callable[[], NextStep]] = {}
    if cfg.reference is not None:
        steps["reference"] = partial(_reference, cfg, load_reference(Path(cfg.reference)))
    if (what_to_do := missing()) is None:
        sizes = cfg.d_in, cfg.d_sae, cfg.k, cfg.device
        steps["dictionary_learning"] = partial(
            dictionary_learning_step, load_dictionary_learning(), *sizes
        )
    else:
        logger.warning("A step of dictionary-learning is left out: %s", what_to_do)
    return steps


def _reference(cfg: StepConfig, reference: Reference) -> NextStep:
    sae = _crosscoder_config(cfg)
    exclusive = sae.a_exclusive_fraction, sae.b_exclusive_fraction
    step = reference_step(reference, cfg.d_a, cfg.d_sae, cfg.k, exclusive, cfg.device)
    return lambda batch: step(batch.view(len(batch), 2, -1))


def _load_libraries(cfg: StepConfig) -> None:
    """Warm up one-time allocations that are not the crosscoder's: kernels and product buffers."""
    tiny = replace(cfg, d_a=8, d_b=8, d_sae=64, k=4, batch=8)
    _built_and_stepped(
        tiny, torch.randn(WARM_UP_STEPS, tiny.batch, tiny.d_in, device=cfg.device).unbind()
    )
    torch.mm(
        torch.randn(cfg.batch, cfg.d_in, device=cfg.device),
        torch.randn(cfg.d_in, cfg.d_sae, device=cfg.device),
    )


# --- what is timed ---


def _measured(
    cfg: StepConfig, device: torch.device, other_steps: Mapping[str, Callable[[], NextStep]]
) -> tuple[list[dict[str, float]], int | None]:
    """Figures of each round, and the peak memory of our training."""
    torch.manual_seed(0)
    logger.info("Drawing %d batches", N_BATCHES)
    batches = _batches(cfg)
    _load_libraries(cfg)
    # Measured before the other trainers exist, whose freed memory would be reused and not counted.
    ours, peak = with_peak_memory(lambda: _built_and_stepped(cfg, batches), device)
    seconds = _seconds(cfg, ours, {name: made() for name, made in other_steps.items()})
    for take in seconds.values():
        for batch in batches[:WARM_UP_STEPS]:
            take(batch)
    progress = tqdm(range(cfg.rounds), "Measuring", unit=" rounds")
    return [with_ratios(_round(seconds, batches, i)) for i in progress], peak


def _seconds(
    cfg: StepConfig, ours: SAETrainer[Any, Any], others: Mapping[str, NextStep]
) -> dict[str, Seconds]:
    W_enc = torch.randn(cfg.d_in, cfg.d_sae, device=cfg.device)
    saelens = _saelens(cfg)
    seconds: dict[str, Seconds] = {
        "encoder_product_ms": lambda batch: timed(lambda: torch.mm(batch, W_enc)),
        "step_ms": lambda batch: timed(lambda: _step(ours, batch)),
        "step_ms_tenth_dead": lambda batch: _with_a_tenth_dead(ours, batch),
        "saelens_ms": lambda batch: timed(lambda: _step(saelens, batch)),
    }
    return seconds | {f"{name}_ms": partial(_of_another, step) for name, step in others.items()}


def _with_a_tenth_dead(trainer: SAETrainer[Any, Any], batch: Tensor) -> float:
    trainer.n_forward_passes_since_fired[::10] = DEAD_FEATURE_WINDOW + 1
    seconds = timed(lambda: _step(trainer, batch))
    # Restore the counts: latents that did not fire would otherwise be dead in the next step, which
    # is another measurement.
    trainer.n_forward_passes_since_fired.zero_()
    return seconds


def _of_another(step: NextStep, batch: Tensor) -> float:
    # The trainer may normalize the batch in place.
    own = batch.clone()
    return timed(lambda: step(own))


def _round(
    seconds: Mapping[str, Seconds], batches: Sequence[Tensor], number: int
) -> dict[str, float]:
    """Milliseconds of each trainer, on the same batches."""
    first = number * STEPS_PER_ROUND
    own = [batches[(first + i) % len(batches)] for i in range(STEPS_PER_ROUND)]
    # Random order each time, so that no trainer always follows the same one.
    names = list(seconds)
    turn = number % len(names)
    order = names[turn:] + names[:turn]
    ms = {name: 1000 * statistics.median(map(seconds[name], own)) for name in order}
    return {name: ms[name] for name in names}
