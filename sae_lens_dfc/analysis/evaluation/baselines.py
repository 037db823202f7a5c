"""Trains a run and its baseline, evaluates both next to a null, and writes the results."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_dfc.analysis.evaluation.assess import AssessOptions, measure, train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.report.build import report_data, report_settings
from sae_lens_dfc.analysis.report.results import Measured, drop_nonfinite, write_results
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.output_folder import locked_output
from sae_lens_dfc.crosscoders.architectures.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import T_CONFIG, CrosscoderTrainingConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluate import evaluate_pca
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.training.checks import with_models
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


def measured_run(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path, overwrite: bool = False
) -> dict[str, float]:
    """Train a crosscoder with its baselines and null; write the crosscoder, metrics.json and
    report.html.

    The baselines are a BatchTopK crosscoder with the same settings on the same pairs, and PCA with
    k components. The null is the same crosscoder on model A twice, where nothing is exclusive.

    Args:
        cfg: Settings of the run; `output_path` is ignored.
        pair: The two models.
        output: Folder for the results, written atomically.
        overwrite: Overwrite the folder.

    Raises:
        ValueError: The folder holds a run, or the settings, models and text do not fit.
    """
    with locked_output(output, overwrite):
        return _measured_run(replace(cfg, output_path=None), pair, output)


def _measured_run(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path
) -> dict[str, float]:
    cfg = with_models(cfg, pair.describe())
    text = PairedText(cfg, pair)
    case = PairTask(cfg, pair, PairData.collect(text, "The two models"))
    run = train_and_measure(case)
    # Cached rows do not record the text they come from.
    run.crosscoder.cfg.metadata.made_of = {"cache": None, "text": text.fingerprint}
    crosscoder, metrics = run.crosscoder, dict(run.evaluation.metrics)

    changes: dict[str, Any] = {}
    if not isinstance(cfg.sae, TopKTrainingCrosscoderConfig):
        # Baseline with the same number of active latents, and with the auxiliary dead-latent loss.
        changes = {"k": max(metrics["l0"], 1.0), "aux_loss_coefficient": 1 / 32}
    baseline_sae = like(cfg.sae, BatchTopKTrainingCrosscoderConfig, **changes)
    baseline = train_and_measure(case._replace(cfg=replace(cfg, sae=baseline_sae, reassign_at=[])))
    metrics |= prefixed("baseline/batchtopk/", baseline.evaluation.metrics)

    data = case.data
    pca = JointPCA.fit(
        [rows.acts for rows in data.training], crosscoder.partition, k=max(1, round(baseline_sae.k))
    )
    linear = evaluate_pca(pca, [rows.acts for rows in data.held_out], crosscoder) | data.metrics
    linear["pairs_trained"] = sum(len(rows.acts) for rows in data.training)
    metrics |= prefixed("baseline/pca/", linear)
    page = report_data(run, data, pair, report_settings(cfg))

    # Free the training rows: half a gigabyte in the demo.
    null = null_case("self", case, in_place=True)
    metrics |= prefixed("null/self/", train_and_measure(null).evaluation.metrics)
    metrics = drop_nonfinite(metrics)
    page = replace(page, metrics=metrics)
    with atomic_folder(output) as folder:
        crosscoder.save_model(folder)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")
        write_results(folder, page, run)
    return metrics


def like(sae: CrosscoderTrainingConfig, config_class: type[T_CONFIG], **changes: Any) -> T_CONFIG:
    """Convert settings to another architecture's config, keeping the fields it has, with
    changes."""
    names = {f.name for f in fields(config_class)} & {f.name for f in fields(sae)}
    values = {name: getattr(sae, name) for name in names - {"metadata"}}
    return config_class(**{**values, **changes})


def train_and_measure(case: PairTask) -> Measured:
    """Train a crosscoder on a case's training activations and measure it on the held-out ones."""
    crosscoder = train_crosscoder(case)
    options = AssessOptions(nulls=[], downstream_pairs=0, behavior_latents=0)
    evaluation = measure(crosscoder, case, options)
    metadata = crosscoder.cfg.metadata
    counts = {"pairs_trained": metadata.pairs_trained, "samples_trained": metadata.samples_trained}
    return Measured(crosscoder, evaluation._replace(metrics=evaluation.metrics | counts))


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Prefix all metric names."""
    return {prefix + name: value for name, value in metrics.items()}
