"""How a DFC's latents should compete for k: three ways, on the demo's pair and on its null, over seeds.

    .venv/bin/python benchmarks/selection.py [--seeds 3] [--output benchmarks/results/selection.json]

About 40 minutes on two cores. The table it prints is the one in benchmarks/README.md.
"""

import argparse
import json
import platform
import statistics
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae_lens_dfc import BatchTopKTrainingCrosscoderConfig, ModelPair
from sae_lens_dfc.demo import DemoConfig, demo_models, demo_run_config
from sae_lens_dfc.measured_run import PairData, like, train_and_measure
from sae_lens_dfc.report import text_table
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText

VARIANTS: dict[str, dict[str, Any]] = {
    "budget by partition": {"selection": "partition", "decoder_norm": "sum"},
    "pooled, sum of norms": {"selection": "pooled", "decoder_norm": "sum"},
    "pooled, L2 of norms": {"selection": "pooled", "decoder_norm": "l2"},
}
BASELINE = "BatchTopK crosscoder"
COLUMNS = [
    "explained_variance/a",
    "explained_variance/b",
    "l0",
    "l0/a_exclusive",
    "l0/b_exclusive",
    "dead_fraction/a_exclusive",
    "dead_fraction/b_exclusive",
]


def configs(cfg: CrosscoderRunnerConfig) -> dict[str, CrosscoderRunnerConfig]:
    """One run for each way of selection, and the baseline."""
    runs = {
        name: replace(cfg, sae=replace(cfg.sae, **changes)) for name, changes in VARIANTS.items()
    }
    baseline = like(replace(cfg.sae, decoder_norm="sum"), BatchTopKTrainingCrosscoderConfig)
    return {**runs, BASELINE: replace(cfg, sae=baseline)}


def measure(pair: ModelPair, name: str, cfg: CrosscoderRunnerConfig, seeds: int) -> list[Any]:
    """All runs on one pair of models."""
    data = PairData.collect(PairedText(cfg, pair), name)
    rows: list[Any] = []
    for seed in range(seeds):
        for variant, run in configs(cfg).items():
            metrics = train_and_measure(replace(run, seed=seed), pair, data).metrics
            rows.append({"pair": name, "selection": variant, "seed": seed, **metrics})
    return rows


def table(rows: list[Any]) -> str:
    """Mean and standard deviation over seeds."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["pair"], row["selection"]), []).append(row)
    body = [
        [f"{pair}: {selection}", *(spread([r.get(c) for r in group]) for c in COLUMNS)]
        for (pair, selection), group in groups.items()
    ]
    return text_table(["", *COLUMNS], body)


def spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    sd = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {sd:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/selection.json"))
    args = parser.parse_args()
    demo = DemoConfig()
    model_a, model_b = demo_models(demo)
    cfg = demo_run_config(demo, model_a, model_b)
    pair = ModelPair.load(model_a, model_b)
    rows = measure(pair, "two models", cfg, args.seeds)
    rows += measure(ModelPair(pair.a, pair.a), "null", cfg, args.seeds)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    result = {
        "commit": commit.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {p: version(p) for p in ("sae-lens", "transformer-lens", "torch")},
        "settings": cfg.to_dict(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
