"""One setting of each architecture for the benchmark of planted differences, chosen on organisms
that it does not score.

    .venv/bin/python -m benchmarks.planted_tuning [--output benchmarks/results/planted_tuning.json]

Each architecture has three values of its own setting (`KNOBS`), tried on organisms of a seed that
is left out of the benchmark, by their discovery prompts alone. A value's merit is how much of the
behavior the best of the first ten latents takes away that tells the prompts apart, as a share of
the models' difference, 0 where there is none. Half an hour on two cores.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.planted.harvest import harvest, joined
from benchmarks.planted.run import Run, organism_of
from benchmarks.planted.scoring.probes import Probes, activations, detection
from benchmarks.planted.scoring.score import MIN_AUC, R, fall, ranking
from benchmarks.planted.training import KNOBS, Training, trained
from benchmarks.provenance import provenance
from sae_lens_dfc import ModelPair
from sae_lens_dfc.core.terminal import text_table
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences

SEED = 2
ORGANISMS = ("refusal/weak", "secret_word/weak", "topic")


def merit(crosscoder: Crosscoder, probes: Probes) -> float:
    """The largest share of the models' difference in preference that one of the first ten latents
    takes from B."""
    probe = probes.discovery
    aucs = detection(crosscoder, probe)
    acts = activations(crosscoder, probe.behavior.rows)
    directions = both_decoder_differences(crosscoder, probes.affine_maps)[1]
    first = ranking(crosscoder, probes.rows, probes.affine_maps)[:R].tolist()
    detecting = [latent for latent in first if aucs[latent] >= MIN_AUC]
    falls = [float(fall(probe, acts[:, i], directions[i]).mean()) for i in detecting]
    gap = float(probe.behavior_b.before.mean() - probe.control_b.before.mean())
    return max(0.0, *falls) / gap if falls else 0.0


def tried(name: str) -> Iterator[dict[str, Any]]:
    """A row for each architecture and value, on one organism."""
    organism = organism_of(Run(name, SEED))
    pair = ModelPair.load(
        *(replace(m, dtype="bfloat16") for m in (organism.model_a, organism.model_b))
    )
    rows = harvest(pair, organism, Training().n_texts, SEED).rows
    probes = Probes.of(pair, organism, joined(rows))
    for i in range(3):
        values = {architecture: grid[i] for architecture, (_, grid) in KNOBS.items()}
        crosscoders = trained(Training(tuned=values), pair, organism, rows, SEED)
        for architecture, crosscoder in crosscoders.items():
            if crosscoder is not None:
                setting = {"setting": KNOBS[architecture][0], "value": values[architecture]}
                score = {"merit": merit(crosscoder, probes), **provenance()}
                yield {"organism": name, "architecture": architecture, **setting, **score}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/planted_tuning.json"))
    output = parser.parse_args().output
    rows: list[dict[str, Any]] = []
    for name in ORGANISMS:
        rows += tried(name)
        output.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        [architecture, setting, *_means(rows, architecture, grid)]
        for architecture, (setting, grid) in KNOBS.items()
    ]
    print(text_table(["architecture", "setting", "low", "middle", "high"], lines))  # noqa: T201


def _means(rows: list[dict[str, Any]], architecture: str, grid: tuple[float, ...]) -> list[str]:
    cells: list[str] = []
    for value in grid:
        own = [r["merit"] for r in rows if (r["architecture"], r["value"]) == (architecture, value)]
        cells.append(f"{value:g}: {sum(own) / len(own):.3f}")
    return cells


if __name__ == "__main__":
    main()
