"""Runs the demo: chooses its models and settings, trains, evaluates and writes the report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.evaluation.measure import train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.analysis.evaluation.with_nulls import (
    Comparisons,
    evaluate_with_nulls,
    write_evaluation,
)
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.output_folder import check_output, locked_output
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import check_device
from sae_lens_dfc.models.loading import in_fast_format, or_base_of
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B, unpack
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.resolve import resolve
from sae_lens_dfc.training.runner import write_cfg

BATCH_SIZE = 1024
LOSS_PAIRS = 3_000
"""Held-out pairs after which both models' losses are measured, which runs the whole models."""


def demo_models(cfg: DemoConfig) -> tuple[ModelConfig, ModelConfig]:
    """The two models of the demo: those given, otherwise the defaults from the package index."""
    check_device(cfg.device)
    how: dict[str, Any] = {"dtype": cfg.dtype, "device": cfg.device}
    name_b = cfg.model_b or str(unpack(DEMO_B))
    model_b = ModelConfig(name_b, cfg.hook_b or "", base=cfg.base_b, **how)
    model_a = or_base_of(ModelConfig(cfg.model_a or "", cfg.hook_a or "", **how), model_b)
    if not model_a.model_name:
        model_a = replace(model_a, model_name=str(unpack(DEMO_A)))
    return in_fast_format(model_a), in_fast_format(model_b)


def demo_run_config(
    cfg: DemoConfig, model_a: ModelConfig, model_b: ModelConfig
) -> CrosscoderRunnerConfig:
    """Settings of the demo run, which takes about seven minutes on two cores without bfloat16."""
    n_steps = cfg.training_tokens // BATCH_SIZE
    return CrosscoderRunnerConfig(
        # A run this short ends before a moving average with step 0.01 converges.
        sae=DFCTrainingCrosscoderConfig(
            d_sae=cfg.d_sae, k=cfg.k, device=cfg.device, topk_threshold_lr=0.05
        ),
        model_a=model_a,
        model_b=model_b,
        dataset_path=cfg.dataset,
        text_column=cfg.text_column,
        max_unique_pairs=cfg.max_unique_pairs,
        training_tokens=cfg.training_tokens,
        eval_pairs=cfg.eval_pairs,
        train_batch_size_tokens=BATCH_SIZE,
        n_batches_in_buffer=32,
        lr=1e-3,
        lr_warm_up_steps=n_steps // 6,
        lr_decay_steps=n_steps // 5,
        dead_feature_window=n_steps // 6,
        device=cfg.device,
        seed=cfg.seed,
    )


def run_demo(cfg: DemoConfig) -> dict[str, float]:
    """Train and evaluate, and write the results to `cfg.output`.

    Raises:
        ValueError: The folder holds a run, or the models or text cannot be loaded.
    """
    check_output(cfg.output, cfg.overwrite)
    model_a, model_b = demo_models(cfg)
    run_cfg = demo_run_config(cfg, model_a, model_b)
    pair = ModelPair.load(model_a, model_b)
    with locked_output(cfg.output, cfg.overwrite):
        return train_and_evaluate(run_cfg, pair, cfg.output)


def train_and_evaluate(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path
) -> dict[str, float]:
    """Train a crosscoder and evaluate it beside its baselines and the null `self`, on activations
    that are computed once; write the run and its results.

    Raises:
        ValueError: The settings, models and text do not fit.
    """
    cfg = resolve(replace(cfg, output_path=None), pair.describe())
    text = PairedText(cfg, pair)
    data = PairData.collect(text, "The two models")
    case = PairTask(cfg, pair, data).with_losses(LOSS_PAIRS)
    for model in (pair.a, pair.b):
        # The models are no longer run; the report only needs the unembedding.
        model.drop_unused_layers(keep_unembedding=True)
    crosscoder = train_crosscoder(case)
    # Rows in memory do not record the text they come from.
    crosscoder.cfg.metadata.made_of = {"cache": None, "text": text.fingerprint}
    found = evaluate_with_nulls(crosscoder, case, Comparisons(["self"], baselines=True))
    with atomic_folder(output) as folder:
        crosscoder.save_model(folder)
        write_cfg(cfg, folder)
        write_evaluation(folder, crosscoder, found, case, cfg)
    return found.metrics
