"""Compares exclusivity with null runs: the share of latents beyond the null, and the nulls'
names."""

from collections.abc import Sequence

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, oriented
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.stats.significance import share_beyond

NULLS = {
    "self": "model A twice",
    "shuffle": "pairs shuffled",
    "seed": "two initializations",
}


def check_nulls(names: Sequence[str], seed_model: ModelConfig | str | None) -> None:
    """Check that these nulls exist and have what they need.

    Raises:
        ValueError: A name is unknown, or `seed` and its model are not given together.
    """
    unknown = [name for name in names if name not in NULLS]
    if unknown:
        raise ValueError(f"There is no null {unknown[0]!r}. Choose from {', '.join(NULLS)}.")
    if ("seed" in names) != (seed_model is not None):
        raise ValueError(
            "The null 'seed' goes with --seed-model, a model that differs from model A in nothing but its initialization. "
            "Give both or none."
        )


def beyond_null(name: str, run: LatentEvidence, null: LatentEvidence) -> dict[str, float]:
    """For each metric, the fraction of the run's latents beyond the null's 95th percentile.

    Keys are `METRIC/GROUP`. For `self` and `seed`, where nothing is exclusive, it is the fraction
    of each model's candidates that are more exclusive than 95 % of the null's candidates of both
    models. For `shuffle`, where nothing is shared, it is the fraction of the shared latents that
    are less exclusive than 95 % of the null's.
    """
    of_run, of_null = oriented(run), oriented(null)
    if name == "shuffle":
        ours, theirs = run.groups[SHARED], null.groups[SHARED]
        return {
            f"{measure}/{SHARED}": share_beyond(-values[ours], -of_null[measure][theirs])
            for measure, values in of_run.items()
        }
    there = null.groups[A_EXCLUSIVE] | null.groups[B_EXCLUSIVE]
    return {
        f"{measure}/{group}": share_beyond(values[run.groups[group]], of_null[measure][there])
        for measure, values in of_run.items()
        for group in (A_EXCLUSIVE, B_EXCLUSIVE)
    }
