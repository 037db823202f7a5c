"""What `evaluate` measures of two real models, over seeds, beside pairs with nothing to find; and what measuring costs."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

from sae_lens_dfc.assess import AssessOptions, known, measure, train
from sae_lens_dfc.benchmark.figures import timed
from sae_lens_dfc.benchmark.memory import with_peak_memory
from sae_lens_dfc.benchmark.planted.run import resumed
from sae_lens_dfc.benchmark.provenance import provenance
from sae_lens_dfc.benchmark.recovery import write
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.demo import DEMO_A, DEMO_B, DemoConfig, demo_models, demo_run_config
from sae_lens_dfc.measured_run import like
from sae_lens_dfc.metrics.downstream import downstream
from sae_lens_dfc.metrics.spread import SE
from sae_lens_dfc.nulls import Case, null_case
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData
from sae_lens_dfc.training.checks import with_models
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText

FILENAME = "evaluate.json"
PAIR = "two models"
"""The case in which there may be something to find; the others are nulls, by their names."""
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
    "exclusive/called_share",
)
"""Of all measures those that a reader cites; a row has null for what its architecture has not."""
N_PRODUCTS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    demo: DemoConfig
    """Models, text and training; its own seed, which decides no text, is not used."""
    seeds: int
    """Trainings of each architecture in each case."""
    nulls: tuple[str, ...]
    """Cases beside the two models; see `null_case`."""
    downstream_pairs: int
    """Held-out pairs at which both models' predictions are measured."""


PRESETS = {
    "small": Preset(
        DemoConfig(training_pairs=8000, training_tokens=51_200, eval_pairs=800, d_sae=512),
        seeds=1,
        nulls=("self",),
        downstream_pairs=1000,
    ),
    "full": Preset(DemoConfig(), seeds=3, nulls=("self", "shuffle"), downstream_pairs=2000),
}


class Run(NamedTuple):
    """One crosscoder to train and measure."""

    case: str
    architecture: str
    seed: int
    """Of its weights, of the order of its batches, and of the null's shuffle. The text is the same for all."""


def runs(preset: Preset) -> list[Run]:
    """Every architecture in every case; the first seed of all before the second."""
    return [
        Run(case, architecture, seed)
        for seed in range(preset.seeds)
        for case in (PAIR, *preset.nulls)
        for architecture in ARCHITECTURES
    ]


def settings(run: Run, preset: Preset) -> dict[str, Any]:
    """What decides a run's numbers."""
    demo = asdict(preset.demo)
    given = {m: demo.pop(f"model_{m}") for m in "ab"}
    for name in ("output", "overwrite", "seed"):
        demo.pop(name)
    values = {
        "run": run._asdict(),
        # Where a model lies is not part of what it is.
        "models": [
            model.sha256 if path is None else Path(path).name
            for path, model in zip(given.values(), (DEMO_A, DEMO_B), strict=True)
        ],
        "demo": demo,
        "downstream_pairs": preset.downstream_pairs,
    }
    return json.loads(json.dumps(values))


def run_evaluate_benchmark(preset_name: str, folder: Path) -> list[dict[str, Any]]:
    """All runs of a preset, the results written after each; what is there already is not run again.

    Args:
        preset_name: Name in `PRESETS`.
        folder: Takes evaluate.json.

    Raises:
        ValueError: The folder's evaluate.json holds results of other settings, or something else.
    """
    preset = PRESETS[preset_name]
    wanted = runs(preset)
    path = folder / FILENAME
    rows = resumed(path, [settings(run, preset) for run in wanted])
    done = [row["settings"] for row in rows]
    todo = [run for run in wanted if settings(run, preset) not in done]
    if not todo:
        return rows
    folder.mkdir(parents=True, exist_ok=True)
    case = _two_models(preset)
    for run in tqdm(todo, "Evaluations", unit=" runs"):
        rows.append({**row(run, case, preset), "settings": settings(run, preset), **provenance()})
        write(rows, path)
    return rows


def _two_models(preset: Preset) -> Case:
    models = demo_models(preset.demo)
    pair = ModelPair.load(*models)
    cfg = demo_run_config(preset.demo, *models)
    cfg = with_models(replace(cfg, output_path=None), pair.describe())
    return Case(cfg, pair, PairData.collect(PairedText(cfg, pair), "The two models"))


def row(run: Run, two_models: Case, preset: Preset) -> dict[str, Any]:
    """Train a run's crosscoder and measure it.

    Returns:
        The run; its `MEASURES`, each with its standard error over the text under `NAME/se` where that is known; and what it
        cost: `training_seconds`; of measuring activations `evaluating_seconds`, those over the time of the product of all held-out pairs
        with a full encoder (`ratio_to_encoder_product`), and `evaluating_peak_bytes`, by which the memory in use grew; and
        `downstream_seconds`, of the two models' predictions.
    """
    cfg = replace(two_models.cfg, seed=run.seed, sae=_crosscoder(run, two_models.cfg))
    case = two_models._replace(cfg=cfg)
    if run.case != PAIR:
        case = null_case(run.case, case)
    crosscoder, training_seconds = _timed(lambda: train(case))
    of_activations = AssessOptions(nulls=[], downstream_pairs=0, behaviour_latents=0)
    (found, seconds), peak = with_peak_memory(
        lambda: _timed(lambda: measure(crosscoder, case, of_activations)), torch.device(cfg.device)
    )
    predicted, downstream_seconds = _timed(
        lambda: _downstream(crosscoder, case, preset.downstream_pairs)
    )
    metrics = known(found.metrics | predicted)
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


def _downstream(crosscoder: Crosscoder, case: Case, n_pairs: int) -> dict[str, float]:
    stitching = case.data.stitching(crosscoder.cfg.d_a).to(crosscoder.device)
    means = torch.cat([stitching.mean_a, stitching.mean_b])
    rows = case.data.held_out_with_text(n_pairs)
    return downstream(crosscoder, case.pair, rows, means, case.order_b)


def _encoder_product(crosscoder: Crosscoder, case: Case) -> float:
    """Seconds of the least that a look at every latent's score takes, on the same pairs."""
    W_enc = torch.randn(crosscoder.cfg.d_in, crosscoder.cfg.d_sae, device=crosscoder.device)
    batches = [rows.acts.to(crosscoder.device) for rows in case.data.held_out]
    products = [
        sum(timed(lambda b=b: torch.mm(b, W_enc)) for b in batches) for _ in range(N_PRODUCTS)
    ]
    return statistics.median(products)
