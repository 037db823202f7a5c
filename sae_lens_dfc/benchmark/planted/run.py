"""The benchmark of planted differences: organisms x seeds x architectures, each row written as soon as it is there."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from sae_lens_dfc.benchmark.planted.finetune import fine_tuned
from sae_lens_dfc.benchmark.planted.from_scratch import from_scratch
from sae_lens_dfc.benchmark.planted.harvest import harvest, joined
from sae_lens_dfc.benchmark.planted.organism import Organism
from sae_lens_dfc.benchmark.planted.score import Probes, score
from sae_lens_dfc.benchmark.provenance import provenance
from sae_lens_dfc.benchmark.recovery import write
from sae_lens_dfc.benchmark.tables import Table
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.delta import DeltaTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.dsf import DSFTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.standard import StandardTrainingCrosscoderConfig
from sae_lens_dfc.demo import DEMO_A, unpack
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

FILENAME = "planted.json"
TOPIC = "topic"
FULL = (
    *(
        f"{name}/{s}"
        for name in ("false_fact", "refusal", "secret_word")
        for s in ("weak", "strong")
    ),
    TOPIC,
)


@dataclass(frozen=True)
class Training:
    """How the crosscoders of an organism are trained."""

    d_sae: int = 1024
    k: float = 32
    steps: int = 400
    batch_size: int = 256
    lr: float = 1e-2
    l1_coefficient: float = 1.0
    """The standard crosscoder's penalty, at which about as many latents are active as the others' k."""
    delta_loss_coefficient: float = 10.0
    """The Delta-Crosscoder's weight of the difference. The paper's 0.005 is for 50,000 steps; in a few hundred it moves nothing."""
    n_texts: int = 120
    """Stretches of ordinary text."""


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    organisms: Sequence[str]
    """Behaviour and strength, or topic."""
    seeds: int
    """Of each organism, its harvest and its crosscoders."""
    training: Training = Training()


PRESETS = {
    "small": Preset(("refusal/strong",), 1),
    "full": Preset(FULL, 2),
}


class Run(NamedTuple):
    """One organism and all crosscoders trained on it."""

    organism: str
    seed: int


def runs(preset: Preset) -> list[Run]:
    """Every organism with every seed; the first seed of all before the second."""
    return [Run(name, seed) for seed in range(preset.seeds) for name in preset.organisms]


def organism_of(run: Run) -> Organism:
    """The pair of a run, built at the first call."""
    if run.organism == TOPIC:
        return from_scratch(run.seed)
    behaviour, strength = run.organism.split("/")
    return fine_tuned(unpack(DEMO_A), behaviour, strength, run.seed)


def crosscoder_configs(
    cfg: Training, d_a: int, d_b: int
) -> dict[str, CrosscoderTrainingConfig | None]:
    """The five architectures; none for the one that needs equal widths, where they differ."""
    sizes: dict[str, Any] = {"d_a": d_a, "d_b": d_b, "d_sae": cfg.d_sae}
    # A run this short is over before an average of step 0.01 has followed the scores.
    top: dict[str, Any] = {**sizes, "k": cfg.k, "topk_threshold_lr": 0.05}
    penalty: dict[str, Any] = {
        "l1_coefficient": cfg.l1_coefficient,
        "l1_warm_up_steps": cfg.steps // 10,
    }
    return {
        "standard_crosscoder": StandardTrainingCrosscoderConfig(**sizes, **penalty),
        "batchtopk_crosscoder": BatchTopKTrainingCrosscoderConfig(**top),
        "dsf_crosscoder": DSFTrainingCrosscoderConfig(
            **top, tie="identity" if d_a == d_b else "linear_map"
        ),
        "delta_crosscoder": DeltaTrainingCrosscoderConfig(
            **top, delta_loss_coefficient=cfg.delta_loss_coefficient
        )
        if d_a == d_b
        else None,
        "dfc": DFCTrainingCrosscoderConfig(**top),
    }


def trained(
    cfg: Training, pair: ModelPair, organism: Organism, rows: Any, seed: int
) -> dict[str, Crosscoder | None]:
    """All architectures, trained on the same batches."""
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


def results(run: Run, cfg: Training) -> Iterator[dict[str, Any]]:
    """One row for each architecture."""
    started = time.monotonic()
    organism = organism_of(run)
    built = time.monotonic()
    # As the models are run in practice; on two cores it is three times as fast as float32.
    pair = ModelPair.load(
        *(replace(m, dtype="bfloat16") for m in (organism.model_a, organism.model_b))
    )
    harvested = harvest(pair, organism, cfg.n_texts, run.seed)
    crosscoders = trained(cfg, pair, organism, harvested.rows, run.seed)
    probes = Probes.of(pair, organism, joined(harvested.rows))
    shared = {
        "build_seconds": round(built - started, 1),
        "harvest_and_training_seconds": round(time.monotonic() - built, 1),
        "behaviour_share": round(harvested.behaviour_share, 3),
        "organism_measures": organism.manifest["measures"],
        "organism_sha256": organism.manifest["sha256"],
        "preferences": {
            "behaviour": float(probes.test.behaviour_b.before.mean()),
            "control": float(probes.test.control_b.before.mean()),
            "control_a": float(probes.test.control_a.before.mean()),
        },
        "settings": settings(run, cfg),
        **provenance(),
    }
    for name, crosscoder in crosscoders.items():
        scored = time.monotonic()
        values = None if crosscoder is None else score(crosscoder, probes, run.seed)
        yield {
            "organism": run.organism,
            "seed": run.seed,
            "architecture": name,
            "score": values,
            "score_seconds": round(time.monotonic() - scored, 1),
            **shared,
        }


def settings(run: Run, cfg: Training) -> dict[str, Any]:
    """What decides a run's numbers beside its organism."""
    return json.loads(json.dumps({"run": run._asdict(), "training": asdict(cfg)}))


def run_planted_benchmark(preset: str, output_folder: Path) -> list[dict[str, Any]]:
    """All runs of a preset, the results written after each; what is there already is not run again.

    Args:
        preset: Name in `PRESETS`.
        output_folder: Takes planted.json and planted.md.

    Raises:
        ValueError: The folder's planted.json holds results of other settings, or something else.
    """
    chosen = PRESETS[preset]
    wanted = runs(chosen)
    path = output_folder / FILENAME
    rows = resumed(path, [settings(run, chosen.training) for run in wanted])
    done = [row["settings"] for row in rows]
    output_folder.mkdir(parents=True, exist_ok=True)
    for run in tqdm(wanted, "Planted differences", unit=" runs"):
        if settings(run, chosen.training) in done:
            continue
        # All of a run's rows or none: they share one training.
        rows += list(results(run, chosen.training))
        write(rows, path)
    text = "\n\n".join(table.markdown() for table in planted_tables(rows))
    path.with_suffix(".md").write_text(text + "\n")
    return rows


def resumed(path: Path, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a results' file.

    Raises:
        ValueError: It holds something else, or rows of settings that are not wanted.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        others = [row for row in rows if row["settings"] not in wanted]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a result of this benchmark ({error!r}). Name another --output."
        ) from None
    if others:
        raise ValueError(
            f"{path} holds {len(others)} results of other settings. Name another --output, or delete it."
        )
    return rows


# --- tables ---


def planted_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """How many runs each architecture confirms, and each run's figures."""
    names = dict.fromkeys(row["architecture"] for row in rows)
    organisms = dict.fromkeys(row["organism"] for row in rows)
    overview = [["", "confirmed", "found", *organisms]]
    for name in names:
        own = [row for row in rows if row["architecture"] == name]
        cells = [_confirmed([r for r in own if r["organism"] == o]) for o in organisms]
        overview.append([name, _confirmed(own), _counted(own, "found"), *cells])
    yield Table("Runs in which the planted difference is confirmed", overview)
    head = ["organism", "seed", "architecture", "rank", "exclusive", "AUC"]
    cells = [[*head, "ablation", "addition to B", "addition to A", "confirmed"]]
    yield Table(
        "Each run; effects in nats per token [95 % interval] and the controls' 95th percentile",
        cells + [_cells(row) for row in rows],
    )


def _confirmed(rows: Sequence[Mapping[str, Any]]) -> str:
    return _counted(rows, "confirmed")


def _counted(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    scores = [row["score"] for row in rows if row["score"] is not None]
    return f"{sum(s[what] for s in scores)} / {len(scores)}" if scores else "not applicable"


def _cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["organism"], str(row["seed"]), row["architecture"]]
    score = row["score"]
    if score is None:
        return [*start, *["–"] * 6, "not applicable"]
    effects = [_effect(score.get(name)) for name in ("ablation", "addition_b", "addition_a")]
    found = [str(score["rank"]), score["exclusive"] or "no", f"{score['auc']:.2f}"]
    return [*start, *found, *effects, "yes" if score["confirmed"] else "no"]


def _effect(effect: Mapping[str, Any] | None) -> str:
    if effect is None:
        return "–"
    low, high = effect["interval"]
    limits = [float(torch.tensor(v).quantile(0.95)) for v in effect["controls"].values()]
    beside = f"; {max(limits):.2f}" if limits else ""
    return f"{effect['mean']:.2f} [{low:.2f}, {high:.2f}]{beside}"
