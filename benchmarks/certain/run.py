"""Benchmarks the calls on pairs whose difference is certain, next to pairs with nothing to find."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.certain.cases import (
    LANGUAGE_REAL,
    LANGUAGE_TINY,
    TRAINING,
    WITHHELD,
    Case,
    Half,
    Pair,
    made,
)
from benchmarks.certain.causal import CausalSizes, in_both, used
from benchmarks.certain.parallel_text import ENGLISH
from benchmarks.certain.score import score
from benchmarks.provenance import provenance
from benchmarks.resume import with_missing
from sae_lens_dfc.analysis.causal.mapped_loss import PREFIX, knows_more_by_group, mapped_loss
from sae_lens_dfc.analysis.evaluation.measure import evidence_in, measure, train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.analysis.screening.causal_tests import subject_of
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.firings_by_group import firings_by_group
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.resolve import resolve

FILENAME = "certain.json"
BATCH_SIZE = 1024
PAIRS = (
    Pair(LANGUAGE_TINY),
    Pair(LANGUAGE_TINY, is_null=True),
    Pair(WITHHELD, 0.2),
    Pair(WITHHELD, 0.05),
    Pair(WITHHELD, 0.01),
    Pair(WITHHELD, 0.2, is_null=True),
    Pair(LANGUAGE_REAL),
    Pair(LANGUAGE_REAL, is_null=True),
)


@dataclass(frozen=True)
class Settings:
    """Training and evaluation of a crosscoder."""

    d_sae: int = 1024
    k: float = 16
    max_unique_pairs: int = 60_000
    steps: int = 600
    eval_pairs: int = 40_000
    loss_pairs: int = 4_000
    """Held-out pairs for the loss with the other's map in place."""
    causal: CausalSizes = CausalSizes()


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    pairs: tuple[Pair, ...]
    seeds: int
    half: Half = "report"
    settings: Settings = Settings()
    of_real_models: Settings = Settings(
        d_sae=2048,
        k=32,
        max_unique_pairs=36_000,
        steps=400,
        eval_pairs=12_000,
        causal=CausalSizes(n_tested=4, n_shared=4, shared_texts=32, shared_controls=4),
    )
    """Settings of `language-real`, whose models take a hundred times as long to read."""

    def settings_of(self, pair: Pair) -> Settings:
        """Training and evaluation of a pair's crosscoder."""
        return self.of_real_models if pair.case == LANGUAGE_REAL else self.settings


PRESETS = {
    "small": Preset(
        (Pair(LANGUAGE_TINY), Pair(LANGUAGE_TINY, is_null=True)),
        seeds=1,
        settings=Settings(max_unique_pairs=20_000, steps=200, eval_pairs=6_000),
    ),
    "full": Preset(PAIRS, seeds=5),
    "tune": Preset(PAIRS, seeds=2, half="tune"),
}


class Run(NamedTuple):
    """One crosscoder."""

    pair: Pair
    seed: int


def runs(preset: Preset) -> list[Run]:
    """Every pair with every seed, seed by seed."""
    return [
        Run(replace(pair, seed=seed if pair.case == WITHHELD else 0), seed)
        for seed in range(preset.seeds)
        for pair in preset.pairs
    ]


def settings(run: Run, preset: Preset) -> dict[str, Any]:
    """Settings that determine a run's results."""
    values = {
        "pair": asdict(run.pair),
        "seed": run.seed,
        "half": preset.half,
        "models": asdict(TRAINING),
        **asdict(preset.settings_of(run.pair)),
    }
    return json.loads(json.dumps(values))


def run_certain_benchmark(preset_name: str, folder: Path) -> list[dict[str, Any]]:
    """Run all runs of a preset, writing the results after each; existing results are not
    recomputed.

    Args:
        preset_name: Name in `PRESETS`.
        folder: Folder for certain.json.

    Raises:
        OSError: A package cannot be downloaded.
        ValueError: The folder's certain.json holds results of other settings, or something else.
    """
    preset = PRESETS[preset_name]

    def rows_of(run: Run) -> list[dict[str, Any]]:
        return [{**row(run, preset), "settings": settings(run, preset), **provenance()}]

    return with_missing(
        folder / FILENAME,
        runs(preset),
        lambda run: settings(run, preset),
        rows_of,
        "Certain differences",
    )


def row(run: Run, preset: Preset) -> dict[str, Any]:
    """Train a run's crosscoder and compare its calls with what is certain.

    Returns:
        The pair; `score`, `used` and `in_both` by side; `knows_more`, the model that the loss with
            the other's map names on each language; and the seconds of each part.
    """
    started, sizes = time.monotonic(), preset.settings_of(run.pair)
    case = made(run.pair, preset.half)
    built = time.monotonic()
    task = collected(case, run.seed, sizes)
    collecting = time.monotonic()
    crosscoder = train_crosscoder(task)
    trained = time.monotonic()
    found = measure(crosscoder, task)
    texts = task.data.held_out_with_text(sizes.loss_pairs)
    affine_maps = task.data.affine_maps(crosscoder.cfg.d_a)
    metrics = found.metrics | mapped_loss(task.pair, texts, affine_maps)
    measured = time.monotonic()
    shares, evidence = firings_by_group(crosscoder, task.data), evidence_in(found)
    on = subject_of(crosscoder, task.pair, task.data)
    are_used = used(on, evidence, shares, case.known_to, sizes.causal)
    are_in_both = in_both(on, evidence, shares, case.known_to, sizes.causal)
    tested = time.monotonic()
    return {
        "certain_case": run.pair.case,
        "share": run.pair.share,
        "is_null": run.pair.is_null,
        "seed": run.seed,
        "score": score(evidence, crosscoder.partition, shares, case.known_to),
        "used": are_used,
        "in_both": are_in_both,
        "known_to": {side: list(languages) for side, languages in case.known_to.items()},
        "knows_more": knows_more_by_group(metrics),
        "rises": {name: value for name, value in metrics.items() if name.startswith(PREFIX)},
        "metrics": {
            name: metrics[name]
            for name in (
                *(f"explained_variance/{m}" for m in "ab"),
                *(f"known/{group}" for group in (A_EXCLUSIVE, B_EXCLUSIVE, "shared")),
                *(f"alignment/coverage_{m}" for m in "ab"),
            )
            if name in metrics
        },
        "seconds": {
            "models": round(built - started, 1),
            "activations": round(collecting - built, 1),
            "training": round(trained - collecting, 1),
            "measures": round(measured - trained, 1),
            "causal tests": round(tested - measured, 1),
        },
    }


def collected(case: Case, seed: int, sizes: Settings) -> PairTask:
    """The case's models with their activations on its text."""
    pair = ModelPair.load(*case.models)
    cfg = resolve(run_config(case, seed, sizes), pair.describe())
    data = PairData.collect(PairedText(cfg, pair), "The two models")
    return PairTask(cfg, pair, data).with_losses()


def run_config(case: Case, seed: int, sizes: Settings) -> CrosscoderRunnerConfig:
    """The training of a crosscoder."""
    return CrosscoderRunnerConfig(
        sae=DFCTrainingCrosscoderConfig(d_sae=sizes.d_sae, k=sizes.k, topk_threshold_lr=0.05),
        model_a=case.models[0],
        model_b=case.models[1],
        # As much English as of all other languages.
        sources=[
            SourceConfig(str(path), weight=len(case.text) - 1 if language == ENGLISH else 1)
            for language, path in case.text.items()
        ],
        max_unique_pairs=sizes.max_unique_pairs,
        training_tokens=sizes.steps * BATCH_SIZE,
        eval_pairs=sizes.eval_pairs,
        train_batch_size_tokens=BATCH_SIZE,
        n_batches_in_buffer=32,
        lr=1e-3,
        lr_warm_up_steps=sizes.steps // 6,
        lr_decay_steps=sizes.steps // 5,
        dead_feature_window=sizes.steps // 6,
        output_path=None,
        seed=seed,
    )
