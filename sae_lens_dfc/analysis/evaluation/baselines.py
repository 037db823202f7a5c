"""Trains and measures the baselines of a crosscoder: BatchTopK with the same settings, and PCA."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from sae_lens_dfc.analysis.evaluation.measure import measure, train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.crosscoders.architectures.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import T_CONFIG, CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate_pca
from sae_lens_dfc.metrics.pca import JointPCA


def baseline_metrics(crosscoder: Crosscoder, run: Evaluation, case: PairTask) -> dict[str, float]:
    """Measures of a BatchTopK crosscoder with the same settings on the same pairs, under
    `baseline/batchtopk/`, and of PCA with as many components as it has active latents, under
    `baseline/pca/`.

    Args:
        crosscoder: The crosscoder that is compared.
        run: Its measures, whose `l0` is the baseline's `k` if it has no `k` of its own.
        case: Its settings, models and rows.
    """
    cfg, data = case.cfg, case.data
    changes: dict[str, Any] = {}
    if not isinstance(cfg.sae, TopKTrainingCrosscoderConfig):
        # Baseline with the same number of active latents, and with the auxiliary dead-latent loss.
        changes = {"k": max(run.metrics["l0"], 1.0), "aux_loss_coefficient": 1 / 32}
    sae = like(cfg.sae, BatchTopKTrainingCrosscoderConfig, **changes)
    baseline = case._replace(cfg=replace(cfg, sae=sae, reassign_at=[]))
    found = measure(train_crosscoder(baseline), baseline).metrics
    k = max(1, round(sae.k))
    pca = JointPCA.fit([rows.acts for rows in data.training], crosscoder.partition, k=k)
    linear = evaluate_pca(pca, [rows.acts for rows in data.held_out], crosscoder) | data.metrics
    linear["pairs_trained"] = sum(len(rows.acts) for rows in data.training)
    return prefixed("baseline/batchtopk/", found) | prefixed("baseline/pca/", linear)


def like(sae: CrosscoderTrainingConfig, config_class: type[T_CONFIG], **changes: Any) -> T_CONFIG:
    """Convert settings to another architecture's config, keeping the fields it has, with
    changes."""
    names = {f.name for f in fields(config_class)} & {f.name for f in fields(sae)}
    values = {name: getattr(sae, name) for name in names - {"metadata"}}
    return config_class(**{**values, **changes})


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Prefix all metric names."""
    return {prefix + name: value for name, value in metrics.items()}
