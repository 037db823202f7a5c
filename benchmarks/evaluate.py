"""Benchmarks `evaluate` on two real models over seeds, next to null pairs, including the cost of
evaluation."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.provenance import provenance
from benchmarks.resume import with_missing
from benchmarks.timing import timed
from sae_lens_dfc.analysis.causal.downstream import downstream
from sae_lens_dfc.analysis.evaluation.baselines import like
from sae_lens_dfc.analysis.evaluation.demo import demo_models, demo_run_config
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.evaluation.measure import measure, train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.report.results import drop_nonfinite
from sae_lens_dfc.crosscoders.architectures.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B
from sae_lens_dfc.stats.jackknife import SE
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.preflight.peak_memory import with_peak_memory
from sae_lens_dfc.training.resolve import resolve

FILENAME = "evaluate.json"
PAIR = "two models"
"""Name of the real case; the other cases are nulls, by name."""
ARCHITECTURES = ("dfc", "batchtopk_crosscoder")
MEASURES = (
    *(f"explained_variance/{m}" for m in "ab"),
    *(f"loss_recovered_from_mean/{m}" for m in "ab"),
    *(f"kl/{m}/without_exclusive" for m in "ab"),
    *("cross_reconstruction/a_from_b", "cross_reconstruction/b_from_a"),
    *(
        f"{measure}/{group}"
        for measure in (
            *("transfer/auc", "latent_scaling/nu_error", "latent_scaling/nu_reconstruction"),
            *("dead_fraction", "l0"),
        )
        for group in ("a_exclusive", "b_exclusive", "shared")
    ),
    "exclusive/significant_share",
)
"""The reported measures; null in a row if the architecture does not have one."""
N_PRODUCTS = 3
LARGE_DEMO = DemoConfig(max_unique_pairs=96_000, training_tokens=307_200, eval_pairs=12_000)
"""The demo's pair and steps, with twice the demo's distinct pairs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    demo: DemoConfig
    """Models, text and training settings; its seed is not used, since the text does not depend on
    it."""
    seeds: int
    """Seeds per architecture and case."""
    nulls: tuple[str, ...]
    """Nulls to run besides the two models; see `null_case`."""
    downstream_pairs: int
    """Held-out pairs on which the models' next-token loss is measured."""


PRESETS = {
    "small": Preset(
        DemoConfig(max_unique_pairs=8000, training_tokens=51_200, eval_pairs=800, d_sae=512),
        seeds=1,
        nulls=("self",),
        downstream_pairs=1000,
    ),
    "full": Preset(LARGE_DEMO, seeds=3, nulls=("self", "shuffle"), downstream_pairs=2000),
}


class Run(NamedTuple):
    """One crosscoder to train and measure."""

    case: str
    architecture: str
    seed: int
    """Seed of the weights, the batch order, and the null's shuffle. The text is the same for
    all."""


def runs(preset: Preset) -> list[Run]:
    """Every architecture in every case, seed by seed."""
    return [
        Run(case, architecture, seed)
        for seed in range(preset.seeds)
        for case in (PAIR, *preset.nulls)
        for architecture in ARCHITECTURES
    ]


def settings(run: Run, preset: Preset) -> dict[str, Any]:
    """Settings that determine a run's results."""
    demo = asdict(preset.demo)
    given = {m: demo.pop(f"model_{m}") for m in "ab"}
    for name in ("output", "overwrite", "seed"):
        demo.pop(name)
    values = {
        "run": run._asdict(),
        # A model's location does not affect the results.
        "models": [
            model.sha256 if path is None else Path(path).name
            for path, model in zip(given.values(), (DEMO_A, DEMO_B), strict=True)
        ],
        "demo": demo,
        "downstream_pairs": preset.downstream_pairs,
    }
    return json.loads(json.dumps(values))


def run_evaluate_benchmark(preset_name: str, folder: Path) -> list[dict[str, Any]]:
    """Run all runs of a preset, writing the results after each; existing results are not
    recomputed.

    Args:
        preset_name: Name in `PRESETS`.
        folder: Folder for evaluate.json.

    Raises:
        ValueError: The folder's evaluate.json holds results of other settings, or something else.
    """
    preset = PRESETS[preset_name]
    # Loaded for the first missing run only.
    two_models = cache(lambda: _two_models(preset))

    def rows_of(run: Run) -> list[dict[str, Any]]:
        own = row(run, two_models(), preset)
        return [{**own, "settings": settings(run, preset), **provenance()}]

    return with_missing(
        folder / FILENAME, runs(preset), lambda run: settings(run, preset), rows_of, "Evaluations"
    )


def _two_models(preset: Preset) -> PairTask:
    models = demo_models(preset.demo)
    pair = ModelPair.load(*models)
    cfg = demo_run_config(preset.demo, *models)
    cfg = resolve(replace(cfg, output_path=None), pair.describe())
    return PairTask(cfg, pair, PairData.collect(PairedText(cfg, pair), "The two models"))


def row(run: Run, two_models: PairTask, preset: Preset) -> dict[str, Any]:
    """Train a run's crosscoder and evaluate it.

    Returns:
        The run; its `MEASURES`, each with its standard error over the text under `NAME/se` if
        known; and its cost: `training_seconds`; for the evaluation of activations
        `evaluating_seconds`, their ratio to the time of one encoder product over all held-out pairs
        (`ratio_to_encoder_product`), and the increase in peak memory (`evaluating_peak_bytes`); and
        `downstream_seconds` for the two models' predictions.
    """
    cfg = replace(two_models.cfg, seed=run.seed, sae=_crosscoder(run, two_models.cfg))
    case = two_models._replace(cfg=cfg)
    if run.case != PAIR:
        case = null_case(run.case, case)
    crosscoder, training_seconds = _timed(lambda: train_crosscoder(case))
    (found, seconds), peak = with_peak_memory(
        lambda: _timed(lambda: measure(crosscoder, case)), torch.device(cfg.device)
    )
    predicted, downstream_seconds = _timed(
        lambda: _downstream(crosscoder, case, preset.downstream_pairs)
    )
    metrics = drop_nonfinite(found.metrics | predicted)
    errors = {name + SE: metrics[name + SE] for name in MEASURES if name + SE in metrics}
    return {
        **run._asdict(),
        **{name: metrics.get(name) for name in MEASURES},
        **errors,
        "training_seconds": training_seconds,
        "evaluating_seconds": seconds,
        "ratio_to_encoder_product": seconds / _encoder_product(crosscoder, case),
        "evaluating_peak_bytes": peak,
        "downstream_seconds": downstream_seconds,
    }


def _crosscoder(run: Run, cfg: CrosscoderRunnerConfig) -> CrosscoderTrainingConfig:
    if run.architecture == "batchtopk_crosscoder":
        return like(cfg.sae, BatchTopKTrainingCrosscoderConfig)
    return cfg.sae


def _timed(do: Callable[[], T]) -> tuple[T, float]:
    results: list[T] = []
    seconds = timed(lambda: results.append(do()))
    return results[0], seconds


def _downstream(crosscoder: Crosscoder, case: PairTask, n_pairs: int) -> dict[str, float]:
    affine_maps = case.data.affine_maps(crosscoder.cfg.d_a).to(crosscoder.device)
    means = torch.cat([affine_maps.mean_a, affine_maps.mean_b])
    rows = case.rows_to_splice(n_pairs)
    return downstream(crosscoder, case.pair, rows, means, case.order_b)


def _encoder_product(crosscoder: Crosscoder, case: PairTask) -> float:
    """Seconds of one encoder product over the same pairs, the lower bound for computing all
    latents."""
    W_enc = torch.randn(crosscoder.cfg.d_in, crosscoder.cfg.d_sae, device=crosscoder.device)
    batches = [rows.acts.to(crosscoder.device) for rows in case.data.held_out]
    products = [
        sum(timed(lambda b=b: torch.mm(b, W_enc)) for b in batches) for _ in range(N_PRODUCTS)
    ]
    return statistics.median(products)
