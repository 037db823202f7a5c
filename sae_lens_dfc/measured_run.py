"""A training run with what it takes to believe it: a baseline, principal components, and the null pair."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.base import T_CONFIG, CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.evaluate import alignment_metrics, evaluate, evaluate_pca
from sae_lens_dfc.latents import latent_cards, strongest_latents
from sae_lens_dfc.metrics.exclusivity import relative_norm_histogram
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.output import all_or_nothing, check_output
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.report import ReportData, render_report
from sae_lens_dfc.segments import Segment, Segments
from sae_lens_dfc.training.checks import with_models
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

METRICS_FILENAME = "metrics.json"
REPORT_FILENAME = "report.html"
LATENTS_PER_PARTITION = 12


@dataclass
class PairData:
    """A pair's activations in memory: those to train on, and those held out with their text."""

    training: list[PairedRows]
    held_out: list[PairedRows]
    contexts: list[Segments]
    """Text of the held-out rows."""
    metrics: dict[str, float]
    """Alignment coverage over all text that was read."""

    @classmethod
    def collect(cls, text: PairedText, name: str) -> "PairData":
        """Run both models over the whole text, once."""
        held = text.collect("held_out", f"{name}: held-out activations")
        if held.counts.pairs == 0:
            raise ValueError(
                f"No pair is held out: {held.counts.texts} documents are, of every {text.cfg.held_out_every}th. "
                "Give more documents, or lower held_out_every."
            )
        training = text.collect("training", f"{name}: activations")
        training.counts.coverage.add(held.counts.coverage)
        return cls(training.rows, held.rows, held.contexts, alignment_metrics(training.counts))


def measured_run(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path, overwrite: bool = False
) -> dict[str, float]:
    """Train a crosscoder and everything to hold beside it; write crosscoder, metrics.json and report.html.

    The baseline is a BatchTopK crosscoder with the same settings on the same pairs; the principal
    components are as many as k; the null is the same crosscoder on model A twice, where nothing is
    exclusive.

    Args:
        cfg: Settings of the run; its own `output_path` is not used.
        pair: The two models.
        output: Folder that takes the results, all of them or none.
        overwrite: Replace what the folder holds.

    Raises:
        ValueError: The folder holds a run, or the settings, models and text do not fit.
    """
    check_output(output, overwrite)
    cfg = with_models(replace(cfg, output_path=None), pair.describe())
    data = PairData.collect(PairedText(cfg, pair), "The two models")
    run = train_and_measure(cfg, pair, data)
    crosscoder, metrics = run.crosscoder, run.metrics

    changes: dict[str, Any] = {}
    if not isinstance(cfg.sae, TopKTrainingCrosscoderConfig):
        # Baselines with as many active latents as it has, and the dead-latent loss that it has not.
        changes = {"k": max(metrics["l0"], 1.0), "aux_loss_coefficient": 1 / 32}
    baseline_sae = like(cfg.sae, BatchTopKTrainingCrosscoderConfig, **changes)
    k = baseline_sae.k
    baseline_cfg = replace(cfg, sae=baseline_sae, test_at=[])
    baseline = train_and_measure(baseline_cfg, pair, data)
    metrics |= _prefixed("baseline/batchtopk/", baseline.metrics)

    pca = JointPCA.fit(
        [rows.acts for rows in data.training], crosscoder.partition, k=max(1, round(k))
    )
    held_out = [rows.acts for rows in data.held_out]
    linear = evaluate_pca(pca, held_out, crosscoder) | data.metrics
    linear["pairs_trained"] = sum(len(rows.acts) for rows in data.training)
    metrics |= _prefixed("baseline/pca/", linear)
    page = report_data(run, data.held_out, data.contexts, pair, settings(cfg))
    data.training.clear()  # half a gigabyte in the demo, and the null needs as much

    metrics |= _prefixed("null/", null_metrics(cfg, pair))
    page = replace(page, metrics=metrics)
    with all_or_nothing(output) as folder:
        crosscoder.save_model(folder)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")
        (folder / METRICS_FILENAME).write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / REPORT_FILENAME).write_text(render_report(page), encoding="utf-8")
    return metrics


def null_metrics(cfg: CrosscoderRunnerConfig, pair: ModelPair) -> dict[str, float]:
    """The same run on model A twice: whatever is exclusive here is false."""
    twin = ModelPair(pair.a, pair.a)
    cfg = replace(cfg, sae=replace(cfg.sae, d_in=0, d_b=pair.d_a), model_b=cfg.model_a)
    data = PairData.collect(PairedText(cfg, twin), "Null, model A twice")
    return train_and_measure(cfg, twin, data).metrics


def like(sae: CrosscoderTrainingConfig, config_class: type[T_CONFIG], **changes: Any) -> T_CONFIG:
    """The same settings for another architecture, as far as it has them, with some changed."""
    names = {f.name for f in fields(config_class)} & {f.name for f in fields(sae)}
    values = {name: getattr(sae, name) for name in names - {"metadata"}}
    return config_class(**{**values, **changes})


class Measured(NamedTuple):
    """A saved crosscoder and what was measured of it on held-out pairs."""

    crosscoder: Crosscoder
    metrics: dict[str, float]
    firing: Firing


def train_and_measure(cfg: CrosscoderRunnerConfig, pair: ModelPair, data: PairData) -> Measured:
    """Train a crosscoder on these activations and measure it on those held out."""
    crosscoder = CrosscoderTrainingRunner(cfg, pair, data.training).run().to_inference()
    metrics, firing = evaluate(crosscoder, [rows.acts for rows in data.held_out])
    metadata = crosscoder.cfg.metadata
    metrics |= data.metrics | {
        "pairs_trained": metadata.pairs_trained,
        "samples_trained": metadata.samples_trained,
    }
    return Measured(crosscoder, metrics, firing)


def report_data(
    measured: Measured,
    rows: Sequence[PairedRows],
    contexts: Sequence[Sequence[Segment]],
    pair: ModelPair,
    shown_settings: Mapping[str, Any],
) -> ReportData:
    """What the page shows of a saved crosscoder."""
    crosscoder, metrics, firing = measured
    latents = strongest_latents(firing, LATENTS_PER_PARTITION)
    return ReportData(
        name_a=pair.a.name,
        name_b=pair.b.name,
        settings=shown_settings,
        metrics=metrics,
        histogram=relative_norm_histogram(crosscoder),
        cards=latent_cards(crosscoder, firing, latents, rows, contexts, pair),
    )


def settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """The settings worth showing, by dotted name."""
    values = cfg.to_dict()
    shown: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in ("sae", "model_a", "model_b"):
            shown |= {f"{name}.{key}": v for key, v in value.items() if key != "metadata"}
        elif name != "logger":
            shown[name] = value
    return shown


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}
