"""Trains an organism's crosscoders: all architectures on the same batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens_dfc.crosscoders.architectures.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.delta import DeltaTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.dsf import DSFTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.standard import StandardTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.organisms.organism import Organism
from sae_lens_dfc.organisms.texts import N_PASSAGES
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

TUNED: Mapping[str, float] = {
    "standard_crosscoder": 1.0,
    "batchtopk_crosscoder": 32,
    "dsf_crosscoder": 32,
    "delta_crosscoder": 1.0,
    "dfc": 16,
}
"""Values selected by benchmarks/planted_tuning.py."""
KNOBS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "standard_crosscoder": ("l1_coefficient", (0.3, 1.0, 3.0)),
    "batchtopk_crosscoder": ("k", (16, 32, 64)),
    "dsf_crosscoder": ("k", (16, 32, 64)),
    "delta_crosscoder": ("delta_loss_coefficient", (1.0, 10.0, 30.0)),
    "dfc": ("k", (16, 32, 64)),
}
"""The tuned setting of each architecture and its three candidate values; the same number for
each."""


@dataclass(frozen=True)
class Training:
    """Training settings of an organism's crosscoders."""

    d_sae: int = 1024
    k: float = 32
    steps: int = 400
    batch_size: int = 256
    lr: float = 1e-2
    n_texts: int = N_PASSAGES
    """Number of passages of ordinary text."""
    tuned: Mapping[str, float] = field(default_factory=lambda: dict(TUNED))
    """Value of each architecture's tuned setting in `KNOBS`; architectures without one are not
    trained."""


def crosscoder_configs(
    cfg: Training, d_a: int, d_b: int
) -> dict[str, CrosscoderTrainingConfig | None]:
    """Configs of the tuned architectures, without the one that needs equal widths if they
    differ."""
    # A run this short ends before a moving average with step 0.01 converges.
    top: dict[str, Any] = {"k": cfg.k, "topk_threshold_lr": 0.05}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "standard_crosscoder": (
            StandardTrainingCrosscoderConfig,
            {"l1_warm_up_steps": cfg.steps // 10},
        ),
        "batchtopk_crosscoder": (BatchTopKTrainingCrosscoderConfig, top),
        "dsf_crosscoder": (
            DSFTrainingCrosscoderConfig,
            {**top, "tie": "identity" if d_a == d_b else "linear_map"},
        ),
        "delta_crosscoder": (DeltaTrainingCrosscoderConfig, top),
        "dfc": (DFCTrainingCrosscoderConfig, top),
    }
    sizes = {"d_a": d_a, "d_b": d_b, "d_sae": cfg.d_sae}
    return {
        name: None
        if name == "delta_crosscoder" and d_a != d_b
        else kind(**{**sizes, **values, KNOBS[name][0]: cfg.tuned[name]})
        for name, (kind, values) in kinds.items()
        if name in cfg.tuned
    }


def trained(
    cfg: Training, pair: ModelPair, organism: Organism, rows: Any, seed: int
) -> dict[str, Crosscoder | None]:
    """Train every tuned architecture on the same batches."""
    configs = crosscoder_configs(cfg, pair.d_a, pair.d_b)
    first, *others = (sae for sae in configs.values() if sae is not None)
    runner = CrosscoderTrainingRunner(
        CrosscoderRunnerConfig(
            sae=first,
            other_saes=others,
            model_a=organism.model_a,
            model_b=organism.model_b,
            training_tokens=cfg.steps * cfg.batch_size,
            train_batch_size_tokens=cfg.batch_size,
            lr=cfg.lr,
            lr_warm_up_steps=cfg.steps // 10,
            lr_decay_steps=cfg.steps // 5,
            dead_feature_window=cfg.steps // 6,
            seed=seed,
        ),
        pair,
        rows,
    )
    done = iter(runner.run_all().values())
    return {
        name: None if sae is None else next(done).to_inference() for name, sae in configs.items()
    }
