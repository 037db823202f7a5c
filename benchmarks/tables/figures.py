"""Extracts comparable figures from each benchmark's results."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evaluate import ARCHITECTURES, MEASURES, PAIR
from benchmarks.planted.options import is_foreign, is_null
from benchmarks.tables.certain_tables import rows_by_case
from benchmarks.tables.compare import Better, Figure, FigureKind
from benchmarks.tables.tables import Rows, case_of, step_name
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE

SHARE = 0.02
"""Smallest change worth reporting in a share, a recall or an AUROC."""
VARIANCE = 0.005
"""The same for a share of variance or loss, which varies less between trainings."""
RATIO = 0.1
"""The same for a ratio of times or memory, as a relative change: two runs on one idle machine
differ by some percent."""

RECOVERY: dict[str, tuple[Better, float]] = {
    "exclusive_recall": ("higher", SHARE),
    "false_exclusive_rate": ("lower", SHARE),
    "evidence_recall": ("higher", SHARE),
    "evidence_precision": ("higher", SHARE),
    "shared_recall": ("higher", SHARE),
    "leakage": ("lower", SHARE),
    "explained_variance/a": ("higher", VARIANCE),
    "explained_variance/b": ("higher", VARIANCE),
}
RECOVERY_ON_NULL: dict[str, tuple[Better, float]] = {
    "exclusive_called": ("lower", 1.0),
    "evidence_significant_share": ("lower", SHARE),
}


def recovery_figures(rows: Rows) -> Iterator[Figure]:
    """Figures of each architecture in each case over seeds, or over cases if there is one seed."""
    by_case = len({row["seed"] for row in rows}) > 1
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        case = f", {case_of(row)}" if by_case or row["null"] else ""
        groups.setdefault(row["architecture"] + case, []).append(row)
    for name, own in groups.items():
        for measure, (better, least) in (RECOVERY_ON_NULL if own[0]["null"] else RECOVERY).items():
            values = {f"{case_of(r)}, seed {r['seed']}": r.get(measure) for r in own}
            subject = _toy(own[0])
            yield from _figure(f"{name}: {measure}", better, least, values, subject=subject)


def _toy(row: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that determine the training pairs, regardless of the architecture; seed and case are
    part of the unit."""
    settings = row["settings"]
    kept = {
        name: value
        for name, value in settings["toy"].items()
        if name not in ("seed", "pairing_noise", "a_exclusive_fraction", "b_exclusive_fraction")
    }
    pairs = {"training pairs": settings["training"]["total_training_samples"]}
    return {**kept, **pairs, "evaluation_pairs": settings["evaluation_pairs"]}


def planted_figures(rows: Rows) -> Iterator[Figure]:
    """Figures of each architecture over organisms and seeds, separately for null organisms and
    beside an unrelated model."""
    groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["score"] is not None:
            beside = " beside an unrelated model" if is_foreign(row["organism"]) else ""
            name = row["architecture"] + beside
            groups.setdefault((name, is_null(row["organism"])), []).append(row)
    for (name, null), own in groups.items():
        yield from _planted(name, own, null)


def _planted(name: str, rows: Rows, null: bool) -> Iterator[Figure]:
    where, better = _where(null)
    units = {f"{row['organism']}, seed {row['seed']}": row for row in rows}
    # Differently built organisms are not comparable.
    subject = {unit: row["settings"]["organism"] for unit, row in units.items()}
    for measure in ("confirmed", "found"):
        values = {unit: float(row["score"][measure]) for unit, row in units.items()}
        title = f"{name}{where}: {measure}"
        yield from _figure(title, better, SHARE, values, kind="binary", subject=subject)
    if not null:
        aucs = {unit: row["score"]["auc"] for unit, row in units.items()}
        yield from _figure(f"{name}: auc", "higher", SHARE, aucs, subject=subject)
        falls = {unit: row["score"]["ablation"]["mean"] for unit, row in units.items()}
        yield from _figure(f"{name}: ablation, nats", "higher", 0.1, falls, subject=subject)


def _where(null: bool) -> tuple[str, Better]:
    # On a null organism, a confirmation is a false positive.
    return (", null", "lower") if null else ("", "higher")


EVALUATE: dict[str, tuple[Better, float]] = {
    "explained_variance": ("higher", VARIANCE),
    "loss_recovered_from_mean": ("higher", VARIANCE),
    "dead_fraction": ("lower", SHARE),
    "kl": ("neither", 0.005),
    "l0": ("neither", 0.5),
}
"""By prefix of the measure's name; for all others neither direction is better, and the smallest
change worth reporting is `SHARE`."""


def evaluate_figures(rows: Rows) -> Iterator[Figure]:
    """Figures of each architecture in each case over seeds, and the cost of evaluation."""
    for case in dict.fromkeys(row["case"] for row in rows):
        for name in ARCHITECTURES:
            own = [r for r in rows if (r["case"], r["architecture"]) == (case, name)]
            for measure in MEASURES if own else ():
                better, least = EVALUATE.get(measure.partition("/")[0], ("neither", SHARE))
                if measure == "exclusive/significant_share" and case != PAIR:
                    better = "lower"
                values = {f"seed {r['seed']}": r.get(measure) for r in own}
                subject = _without_run(own[0])
                yield from _figure(
                    f"{name}, {case}: {measure}", better, least, values, subject=subject
                )
    for name in ("ratio_to_encoder_product", "evaluating_peak_bytes"):
        values = {f"{r['case']}, {r['architecture']}, seed {r['seed']}": r[name] for r in rows}
        machine = _machine(rows[0]) if name.startswith("ratio") else {}
        yield from _ratio(name, "lower", values, {**_without_run(rows[0]), **machine})
    for name in ("training_seconds", "evaluating_seconds", "downstream_seconds"):
        yield from _figure(
            name, "lower", 1.0, {str(i): r[name] for i, r in enumerate(rows)}, "raw time"
        )


def _without_run(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row["settings"].items() if name != "run"}


def step_figures(rows: Rows) -> Iterator[Figure]:
    """Ratios of each configuration over rounds."""
    for row in rows:
        name = step_name(row)
        subject = {**row["sizes"], "device": row["settings"]["device"]}
        for measure in row["spread"]:
            if measure.startswith(("ratio_to_", "speedup_over_")):
                better: Better = "lower" if measure.startswith("ratio_to_") else "higher"
                timed = {**subject, **_machine(row)}
                yield from _of_rounds(f"{name}: {measure}", better, measure, row, timed)
            else:
                value = {"": row[measure]}
                yield from _figure(f"{name}: {measure}", "lower", 1.0, value, "raw time")
        memory = {"": row["peak_memory_ratio"]}
        yield from _ratio(f"{name}: peak_memory_ratio", "lower", memory, subject, kind="once")


DATA: dict[str, Better] = {
    "harvest_ratio": "higher",
    "cache_write_ratio": "higher",
    "alignment_ratio": "lower",
    "shuffled_read_ratio": "higher",
    "shuffled_read_ratio_first_epoch": "higher",
    "shuffled_read_ratio_from_disk": "higher",
}
DATA_ONCE: dict[str, tuple[Better, float]] = {
    "padding_share": ("lower", 0.005),
    "order/rank_correlation": ("neither", SHARE),
    "order/clustering": ("neither", 1.0),
}


def data_figures(rows: Rows) -> Iterator[Figure]:
    """Ratios over rounds, and measures of the shuffled order."""
    for row in rows:
        subject = {"preset": row["preset"], "models": row["models"]}
        timed = {**subject, **_machine(row)}
        for measure, better in DATA.items():
            yield from _of_rounds(measure, better, measure, row, timed)
        for measure, (better, least) in DATA_ONCE.items():
            value = {"": row[measure]}
            yield from _figure(measure, better, least, value, "once", subject=subject)
        rates = [name for name in row if name.startswith(("pairs_per_second", "written_gb_per_s"))]
        for measure in rates:
            yield from _figure(measure, "higher", 1.0, {"": row[measure]}, "raw time")


def _of_rounds(
    name: str, better: Better, measure: str, row: Mapping[str, Any], subject: Mapping[str, Any]
) -> Iterator[Figure]:
    rounds = row.get("rounds")
    if rounds is None:
        low, high = row["spread"][measure]
        yield Figure(
            name,
            better,
            RATIO * row[measure],
            {"median": row[measure]},
            is_paired=False,
            subject=subject,
            range=(low, high),
        )
        return
    values = {f"round {i}": one[measure] for i, one in enumerate(rounds)}
    yield Figure(name, better, RATIO * row[measure], values, is_paired=False, subject=subject)


def _ratio(
    name: str,
    better: Better,
    values: Mapping[str, float | None],
    subject: Mapping[str, Any],
    kind: FigureKind = "value",
) -> Iterator[Figure]:
    known = [value for value in values.values() if value is not None]
    least = RATIO * sum(known) / len(known) if known else 0.0
    yield from _figure(name, better, least, values, kind, subject=subject)


def _figure(
    name: str,
    better: Better,
    least: float,
    values: Mapping[str, float | None],
    kind: FigureKind = "value",
    subject: Mapping[str, Any] | None = None,
) -> Iterator[Figure]:
    """The figure, or nothing if no unit has it."""
    known = {unit: float(value) for unit, value in values.items() if value is not None}
    if known:
        yield Figure(name, better, least, known, kind, subject=subject or {})


def _machine(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("machine", "cpu", "formats") if row.get(name)}


def certain_figures(rows: Rows) -> Iterator[Figure]:
    """Calls per run of each case and side, and the share of them that is right."""
    for case, own in rows_by_case(rows).items():
        for side in (A_EXCLUSIVE, B_EXCLUSIVE):
            scores = {f"seed {row['seed']}": row["score"][side] for row in own}
            is_known = any(side in row["known_to"] for row in own)
            called = {seed: float(score["called"]) for seed, score in scores.items()}
            better: Better = "higher" if is_known else "lower"
            subject = _without_run(own[0])
            yield from _figure(f"{case}, {side}: called", better, 1.0, called, subject=subject)
            if is_known:
                right = {
                    seed: score["right"] / score["called"]
                    for seed, score in scores.items()
                    if score["called"]
                }
                yield from _figure(
                    f"{case}, {side}: precision", "higher", SHARE, right, subject=subject
                )
