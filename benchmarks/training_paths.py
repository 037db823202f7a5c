"""What the ways of computing a training step change in a training on real activations, over seeds.

    .venv/bin/python -m benchmarks.training_paths [--cache runs/paths-cache] [--seeds 3] [--output benchmarks/results/training_paths.json]

Ten minutes on two cores, with the rows of the demo's two models. Each training takes the same
batches from the same weights as the exact sparse one of its seed, with which it is compared. The
dense path, whose numbers differ by rounding alone, is the null.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance
from sae_lens_dfc import (
    CacheConfig,
    DFCTrainingCrosscoder,
    DFCTrainingCrosscoderConfig,
    PairedActivationsCache,
    cache_activations,
)
from sae_lens_dfc.analysis.evaluation.demo import demo_models
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.core.terminal import text_table
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer

EXACT = "sparse"
VARIANTS: dict[str, dict[str, str]] = {
    EXACT: {"training_path": "sparse"},
    "dense": {"training_path": "dense"},
    "sparse, bfloat16 product": {"training_path": "sparse", "encoder_product": "bfloat16"},
}
BATCH, STEPS, LAST, N_PAIRS = 1024, 200, 50, 50_000


def open_cache(folder: str) -> PairedActivationsCache:
    """The rows of the demo's two models."""
    if not Path(folder).exists():
        model_a, model_b = demo_models(DemoConfig())
        cache_activations(
            CacheConfig(
                model_a=model_a, model_b=model_b, max_unique_pairs=N_PAIRS, cache_path=folder
            )
        )
    return PairedActivationsCache(folder)


def train(cache: PairedActivationsCache, seed: int, variant: dict[str, str]) -> dict[str, Any]:
    """A training's losses, and what it took."""
    torch.manual_seed(seed)
    sae = DFCTrainingCrosscoderConfig(
        d_a=cache.d_a,
        d_b=cache.d_b,
        d_sae=4096,
        k=32,
        **variant,  # type: ignore[arg-type]
    )
    cfg = CrosscoderRunnerConfig(
        sae=sae,
        lr=5e-4,
        training_tokens=BATCH * STEPS,
        train_batch_size_tokens=BATCH,
        dead_feature_window=50,
    )
    trainer = CrosscoderSAETrainer(
        cfg.to_sae_trainer_config(), DFCTrainingCrosscoder(sae), iter(())
    )
    losses: list[torch.Tensor] = []
    start = time.perf_counter()
    batches = cache.batches(BATCH, seed)
    for _ in range(STEPS):
        losses.append(trainer.step(next(batches).acts).loss)
        trainer.n_training_steps += 1
    return {
        "losses": torch.stack(losses).tolist(),
        "dead": int(trainer.dead_neurons.sum()),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Train all variants of all seeds, write the results and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", default="runs/paths-cache", help="made if it is not there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/training_paths.json")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    runs = {
        name: [train(cache, seed, variant) for seed in range(args.seeds)]
        for name, variant in VARIANTS.items()
    }
    means = {
        name: [statistics.mean(run["losses"][-LAST:]) for run in own] for name, own in runs.items()
    }
    results: dict[str, Any] = {
        "loss": means,
        "relative_to_exact": {
            name: [loss / exact - 1 for loss, exact in zip(own, means[EXACT], strict=True)]
            for name, own in means.items()
        },
        "largest_difference_of_a_step": {
            name: [_largest_difference(*both) for both in zip(own, runs[EXACT], strict=True)]
            for name, own in runs.items()
        },
        "dead": {name: [run["dead"] for run in own] for name, own in runs.items()},
        "seconds": {name: [run["seconds"] for run in own] for name, own in runs.items()},
        "settings": {"batch": BATCH, "steps": STEPS, "last": LAST, "d_sae": 4096, "k": 32},
        "pairs": len(cache),
        **provenance(),
    }
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    names = ("loss", "relative_to_exact", "largest_difference_of_a_step", "seconds")
    cells = [[variant, *(_range(results[n][variant]) for n in names)] for variant in VARIANTS]
    print(text_table(["", *names], cells))  # noqa: T201


def _largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["losses"], other["losses"], strict=True)
    return max(abs(a / b - 1) for a, b in pairs)


def _range(values: list[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


if __name__ == "__main__":
    main()
