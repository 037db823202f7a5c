"""Formats the tables of the planted-difference benchmark."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.planted.options import is_foreign, is_null
from benchmarks.tables.tables import Table
from sae_lens_dfc.stats.significance import limit


def planted_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Number of runs confirmed by each architecture, and the figures of each run; then the numbers
    of the pairs with an unrelated model."""
    foreign = [row for row in rows if is_foreign(row["organism"])]
    own = [row for row in rows if not is_foreign(row["organism"])]
    yield Table("Runs in which the planted difference is confirmed", _overview(own))
    head = ["organism", "seed", "behavior shown", "architecture", "rank", "exclusive", "AUC"]
    cells = [[*head, "ablation", "addition to B", "addition to A", "confirmed"]]
    yield Table(
        "Each run: effects in nats [95 % interval]; 95th percentile of random directions / other latents",
        cells + [_cells(row) for row in rows],
    )
    if foreign:
        yield foreign_table(foreign)


def foreign_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Number of runs confirmed beside an unrelated model."""
    title = "Runs in which the planted difference is confirmed, beside an unrelated model"
    return Table(title, _overview(rows))


def _overview(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = dict.fromkeys(row["architecture"] for row in rows)
    organisms = dict.fromkeys(row["organism"] for row in rows)
    overview = [["", "confirmed", "found", *organisms]]
    for name in names:
        own = [row for row in rows if row["architecture"] == name]
        cells = [_confirmed([r for r in own if r["organism"] == o]) for o in organisms]
        # On a null organism, a confirmation is a false positive.
        planted = [row for row in own if not is_null(row["organism"])]
        overview.append([name, _confirmed(planted), _counted(planted, "found"), *cells])
    return overview


def _confirmed(rows: Sequence[Mapping[str, Any]]) -> str:
    return _counted(rows, "confirmed")


def _counted(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    scores = [row["score"] for row in rows if row["score"] is not None]
    return f"{sum(s[what] for s in scores)} / {len(scores)}" if scores else "not applicable"


def _cells(row: Mapping[str, Any]) -> list[str]:
    # How often the organism shows the behavior on held-out triggering prompts.
    shown = f"{row['shown']['behavior']:.0%}"
    start = [row["organism"], str(row["seed"]), shown, row["architecture"]]
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
    limits = [limit(torch.tensor(values)) for values in effect.get("controls", {}).values()]
    beside = f"; {max(limits):.2f}" if limits else ""
    if others := effect.get("other_latents"):
        beside += f" / {limit(torch.tensor(others)):.2f}"
    return f"{effect['mean']:.2f} [{low:.2f}, {high:.2f}]{beside}"
