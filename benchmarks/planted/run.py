"""Benchmarks planted differences: organisms x seeds x architectures, writing each row as soon as it
is computed."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.planted.harvest import harvest, joined
from benchmarks.planted.options import FOREIGN, FULL, NULL, is_foreign, is_null
from benchmarks.planted.scoring.probes import Probes
from benchmarks.planted.scoring.score import score
from benchmarks.planted.training import TUNED, Training, trained
from benchmarks.provenance import provenance
from benchmarks.resume import with_missing
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.number_formats import fast_dtype
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B, unpack
from sae_lens_dfc.organisms import named
from sae_lens_dfc.organisms.finetune import fine_tuning_settings
from sae_lens_dfc.organisms.from_scratch import topic_settings
from sae_lens_dfc.organisms.options import TOPIC
from sae_lens_dfc.organisms.organism import Organism, key

FILENAME = "planted.json"
NULL_BEHAVIOR = "secret_word"
"""The behavior whose prompts are used for the null of all."""

BESIDE_FOREIGN = ("batchtopk_crosscoder", "dfc")
"""The architectures trained beside an unrelated model."""


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    organisms: Sequence[str]
    """Names of organisms; see `options`."""
    seeds: int
    """Seeds of each organism, its harvest and its crosscoders."""
    training: Training = Training()


SMALL = ("batchtopk_crosscoder", "delta_crosscoder", "dfc")
PRESETS = {
    "small": Preset(
        ("false_fact/strong",),
        1,
        Training(steps=200, n_texts=60, tuned={name: TUNED[name] for name in SMALL}),
    ),
    "full": Preset(FULL, 2),
}


class Run(NamedTuple):
    """One organism with one seed, and all crosscoders trained on it."""

    organism: str
    seed: int


def runs(preset: Preset) -> list[Run]:
    """Every organism with every seed, seed by seed."""
    return [Run(name, seed) for seed in range(preset.seeds) for name in preset.organisms]


def organism_of(run: Run) -> Organism:
    """The organism of a run, built at the first call."""
    name = run.organism.removeprefix(FOREIGN)
    if is_null(name):
        known = named.organism_of(f"{_behavior(name)}/weak", run.seed)
        organism = replace(known, name=NULL, model_b=known.model_a, added={})
    else:
        organism = named.organism_of(name, run.seed)
    if is_foreign(run.organism):
        return replace(organism, model_a=ModelConfig(str(unpack(DEMO_B))), added={})
    return organism


def _behavior(name: str) -> str:
    """The behavior of a fine-tune or a null."""
    return NULL_BEHAVIOR if name == NULL else name.partition("/")[0]


def organism_key(run: Run) -> str:
    """Fingerprint of an organism, which changes when its definition does."""
    if run.organism == TOPIC:
        return key(topic_settings(run.seed))
    behavior = _behavior(run.organism.removeprefix(FOREIGN))
    return key(fine_tuning_settings(unpack(DEMO_A), behavior, run.seed))


def results(run: Run, cfg: Training) -> Iterator[dict[str, Any]]:
    """Yield one row per architecture."""
    started = time.monotonic()
    organism = organism_of(run)
    built = time.monotonic()
    models = organism.model_a, organism.model_b
    pair = ModelPair.load(*(replace(m, dtype=fast_dtype(m.device)) for m in models))
    harvested = harvest(pair, organism, cfg.n_texts, run.seed)
    crosscoders = trained(cfg, pair, organism, harvested.rows, run.seed)
    probes = Probes.of(pair, organism, joined(harvested.rows))
    test = probes.test
    before = {
        "behavior": test.behavior_b.before,
        "control": test.control_b.before,
        "control_a": test.control_a.before,
    }
    shared = {
        "build_seconds": round(built - started, 1),
        "harvest_and_training_seconds": round(time.monotonic() - built, 1),
        "behavior_share": round(harvested.behavior_share, 3),
        "organism_measures": organism.manifest["measures"],
        "organism_sha256": organism.manifest["sha256"],
        "preferences": {name: float(values.mean()) for name, values in before.items()},
        "shown": {name: float((values > 0).float().mean()) for name, values in before.items()},
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


def training_of(run: Run, preset: Preset) -> Training:
    """The training settings of a run; beside an unrelated model only some architectures are
    trained."""
    cfg = preset.training
    if not is_foreign(run.organism):
        return cfg
    return replace(cfg, tuned={n: x for n, x in cfg.tuned.items() if n in BESIDE_FOREIGN})


def settings(run: Run, cfg: Training) -> dict[str, Any]:
    """Settings that determine a run's results."""
    values = {"run": run._asdict(), "organism": organism_key(run), "training": asdict(cfg)}
    return json.loads(json.dumps(values))


def run_planted_benchmark(preset: str, output_folder: Path) -> list[dict[str, Any]]:
    """Run all runs of a preset, writing the results after each; existing results are not
    recomputed.

    Args:
        preset: Name in `PRESETS`.
        output_folder: Folder for planted.json.

    Raises:
        ValueError: The folder's planted.json holds results of other settings, or something else.
    """
    chosen = PRESETS[preset]
    return with_missing(
        output_folder / FILENAME,
        runs(chosen),
        lambda run: settings(run, training_of(run, chosen)),
        # A run's rows share one training.
        lambda run: results(run, training_of(run, chosen)),
        "Planted differences",
    )
