"""How a DFC's latents should compete for k, and what tests leave exclusive, on the demo's pair and
on its null, over seeds.

    .venv/bin/python -m benchmarks.selection [--only NAME ...] [--seeds 3] [--output benchmarks/results/selection.json]

About an hour on two cores; `--only` runs some and keeps the file's other rows. The table it prints
is the one in benchmarks/README.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evaluate import LARGE_DEMO
from benchmarks.provenance import provenance
from sae_lens_dfc import BatchTopKTrainingCrosscoderConfig, ModelPair
from sae_lens_dfc.analysis.evaluation.baselines import like
from sae_lens_dfc.analysis.evaluation.demo import demo_models, demo_run_config
from sae_lens_dfc.analysis.evaluation.measure import measure as measured
from sae_lens_dfc.analysis.evaluation.measure import train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.analysis.report.tables import spread
from sae_lens_dfc.core.terminal import text_table
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.recipes.named import REASSIGN_AT

VARIANTS: dict[str, dict[str, Any]] = {
    "budget by partition": {"selection": "partition", "decoder_norm": "sum"},
    "pooled, sum of norms": {"selection": "pooled", "decoder_norm": "sum"},
    "pooled, L2 of norms": {"selection": "pooled", "decoder_norm": "l2"},
}
BASELINE = "BatchTopK crosscoder"
TESTED = {"pooled, sum of norms, tested": "sum", "pooled, L2 of norms, tested": "l2"}
COLUMNS = [
    "explained_variance/a",
    "explained_variance/b",
    "latents/a_exclusive",
    "latents/b_exclusive",
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
    for name, norm in TESTED.items():
        sae = replace(cfg.sae, decoder_norm=norm)
        runs[name] = replace(cfg, sae=sae, reassign_at=list(REASSIGN_AT))
    baseline = like(replace(cfg.sae, decoder_norm="sum"), BatchTopKTrainingCrosscoderConfig)
    return {**runs, BASELINE: replace(cfg, sae=baseline)}


def measure(
    pair: ModelPair, name: str, cfg: CrosscoderRunnerConfig, seeds: int, only: list[str]
) -> list[Any]:
    """All runs on one pair of models, or those named."""
    data = PairData.collect(PairedText(cfg, pair), name)
    rows: list[Any] = []
    source = provenance()
    for seed in range(seeds):
        for variant, run in configs(cfg).items():
            if only and variant not in only:
                continue
            case = PairTask(replace(run, seed=seed), pair, data)
            metrics = measured(train_crosscoder(case), case).metrics
            rows.append({"pair": name, "selection": variant, "seed": seed, **source, **metrics})
    return rows


def table(rows: list[Any]) -> str:
    """Mean and standard deviation over seeds."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["pair"], row["selection"]), []).append(row)
    body = [
        [
            f"{pair}: {selection}",
            *(spread([r[c] for r in group if r.get(c) is not None], 3) for c in COLUMNS),
        ]
        for (pair, selection), group in groups.items()
    ]
    return text_table(["", *COLUMNS], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], choices=[*VARIANTS, *TESTED, BASELINE])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/selection.json"))
    args = parser.parse_args()
    demo = LARGE_DEMO
    model_a, model_b = demo_models(demo)
    cfg = demo_run_config(demo, model_a, model_b)
    pair = ModelPair.load(model_a, model_b)
    rows = measure(pair, "two models", cfg, args.seeds, args.only)
    rows += measure(ModelPair(pair.a, pair.a), "null", cfg, args.seeds, args.only)
    if args.only:
        old = json.loads(args.output.read_text())["rows"]
        rows = [row for row in old if row["selection"] not in args.only] + rows
    result = {"settings": cfg.to_dict(), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
