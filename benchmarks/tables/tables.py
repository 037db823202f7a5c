"""Formats benchmark results as tables: means and standard deviations over seeds, medians and ranges
over rounds."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.timing import figure_rows
from sae_lens_dfc.analysis.report.tables import ROWS, number, spread
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS

Rows = Sequence[Mapping[str, Any]]

COLUMNS = {
    "exclusive_recall": "exclusive recall",
    "exclusive_learned": "learned anywhere",
    "false_exclusive_rate": "false exclusive rate",
    "exclusive_called": "called exclusive",
    "evidence_recall": "recall of calls with evidence",
    "evidence_precision": "precision of calls with evidence",
    "evidence_significant_share": "share of latents called with evidence",
    "leakage": "leakage",
    "shared_recall": "shared recall",
    "explained_variance/a": "EV A",
    "explained_variance/b": "EV B",
    "l0": "L0",
    "training_time": "training time, relative to batchtopk_crosscoder",
}


BASELINE = "batchtopk_crosscoder"
ONE_LATENT = "1 latent per feature"
TOGETHER = "features that fire together"
FREQUENCY_COLUMNS = {"exclusive_recall": "exclusive recall", "shared_recall": "shared recall"}


class Table(NamedTuple):
    """A title and cells, of which the first row is the head."""

    title: str
    cells: list[list[str]]

    def markdown(self) -> str:
        head, *body = ("| " + " | ".join(line) + " |" for line in self.cells)
        return "\n".join([f"**{self.title}**\n", head, "|---" * len(self.cells[0]) + "|", *body])


def tables(rows: Rows) -> Iterator[Table]:
    """An overview, and tables by dictionary size, feature frequency and pairing noise, and for the
    null."""
    rows = with_training_times(rows)
    with_exclusive = [row for row in rows if not row["null"]]
    null = [row for row in rows if row["null"]]
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(with_exclusive, key=lambda r: (r["pairing_noise"], r["d_sae_per_feature"])):
        cases.setdefault(case_of(row), []).append(row)
    yield Table("Exclusive recall; false exclusive rate", _overview(cases, null))
    for title, group in cases.items():
        yield Table(title, _cells(group))
    yield Table(
        f"{ONE_LATENT}, by feature frequency", _cells_by_frequency(cases.get(ONE_LATENT, []))
    )
    yield Table("Null: no feature is exclusive", _cells(null))


def with_training_times(rows: Rows) -> Rows:
    """Add `training_time` to the rows, relative to the BatchTopK crosscoder on the same toy pair
    with the same size.

    None if either is unknown, or if they are from different machines.

    >>> run = {"d_sae": 8, "seed": 0, "pairing_noise": 0.0, "null": False, "machine": "a"}
    >>> times = {"batchtopk_crosscoder": 2.0, "dfc": 3.0}
    >>> rows = [{**run, "architecture": name, "training_seconds": s} for name, s in times.items()]
    >>> [row["training_time"] for row in with_training_times(rows)]
    [1.0, 1.5]
    """
    ours = {
        _case(row): row["training_seconds"]
        for row in rows
        if row["architecture"] == BASELINE and row.get("training_seconds")
    }
    return [
        {**row, "training_time": _over(row.get("training_seconds"), ours.get(_case(row)))}
        for row in rows
    ]


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("d_sae", "seed", "pairing_noise", "null", "machine"))


def _over(seconds: float | None, ours: float | None) -> float | None:
    return None if seconds is None or ours is None else seconds / ours


def _overview(cases: Mapping[str, Rows], null: Rows) -> list[list[str]]:
    names = dict.fromkeys(row["architecture"] for rows in cases.values() for row in rows)
    body = [
        [
            name,
            *(
                "; ".join(
                    spread(_values(rows, name, column))
                    for column in ("exclusive_recall", "false_exclusive_rate")
                )
                for rows in cases.values()
            ),
            spread(_values(null, name, "exclusive_called")),
        ]
        for name in names
    ]
    return [["", *cases, "called exclusive on the null"], *body]


FREQUENCIES = {
    "rarest 3 deciles": range(3),
    "middle 4": range(3, 7),
    "most frequent 3": range(7, 10),
}


def _cells_by_frequency(rows: Rows) -> list[list[str]]:
    names = dict.fromkeys(row["architecture"] for row in rows)
    columns = [(kind, deciles) for kind in FREQUENCY_COLUMNS for deciles in FREQUENCIES.values()]
    head = [
        "",
        *(f"{kind}, {group}" for kind in FREQUENCY_COLUMNS.values() for group in FREQUENCIES),
    ]
    body: list[list[str]] = []
    for name in names:
        own = [row for row in rows if row["architecture"] == name]
        groups = [
            [_mean([row[f"{kind}/by_frequency"][i] for i in deciles]) for row in own]
            for kind, deciles in columns
        ]
        body.append([name, *(spread([v for v in values if v is not None]) for values in groups)])
    return [head, *body]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _cells(rows: Rows) -> list[list[str]]:
    names = {row["architecture"]: None for row in rows}
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    return [["", *(COLUMNS[c] for c in columns)]] + [
        [name, *(spread(_values(rows, name, column)) for column in columns)] for name in names
    ]


def _values(rows: Rows, name: str, column: str) -> list[float]:
    values = [row.get(column) for row in rows if row["architecture"] == name]
    return [float(value) for value in values if value is not None]


def case_of(row: Mapping[str, Any]) -> str:
    """Name of the case that a crosscoder of the recovery benchmark was trained on.

    >>> case_of({"null": False, "pairing_noise": 0.3, "d_sae_per_feature": 1.0})
    '30% wrong pairs'
    """
    if row["null"]:
        return "null"
    if row["pairing_noise"] > 0:
        return f"{row['pairing_noise']:.0%} wrong pairs"
    if row.get("firing_correlation", 0) > 0:
        return TOGETHER
    size = row["d_sae_per_feature"]
    return ONE_LATENT if size == 1 else f"{size:g} latents per feature"


# --- step and data ---

STEP_TIMES = {
    "encoder_product_ms": "encoder product alone, float32",
    "step_ms": "step",
    "step_ms_tenth_dead": "step, 10% of latents dead",
}
STEP_RATIOS = {
    "ratio_to_encoder_product": ("step / product", 2),
    "speedup_over_saelens": ("SAELens / step", 1),
    "speedup_over_reference": ("reference / step", 1),
    "speedup_over_dictionary_learning": ("dictionary-learning / step", 1),
}


def step_name(row: Mapping[str, Any]) -> str:
    """Name of a step configuration.

    >>> step_name({"sizes": {"d_sae": 8192}, "settings": {"dtype": "bfloat16"}})
    '8,192 latents, bfloat16 product'
    """
    return f"{row['sizes']['d_sae']:,} latents, {row['settings']['dtype']} product"


def in_order(rows: Rows) -> Rows:
    """Step configurations sorted by float32 first, then by dictionary size."""
    return sorted(rows, key=lambda r: (r["settings"]["dtype"] != "float32", r["sizes"]["d_sae"]))


def step_tables(rows: Rows) -> Iterator[Table]:
    """All configurations side by side (median and range over rounds), and every figure of each."""
    rows = in_order(rows)
    ratios = {name: said for name, said in STEP_RATIOS.items() if any(r.get(name) for r in rows)}
    head = [
        "",
        *STEP_TIMES.values(),
        *(title for title, _ in ratios.values()),
        "peak memory / minimum",
    ]
    body = [
        [
            step_name(row),
            *(f"{row[name]:.0f} ms" for name in STEP_TIMES),
            *(_median_and_range(row, name, digits) for name, (_, digits) in ratios.items()),
            _digits(row["peak_memory_ratio"], 2),
        ]
        for row in rows
    ]
    yield Table("Training step: median and range over rounds", [head, *body])
    for row in rows:
        yield Table(step_name(row), [FIGURES_HEAD, *figure_rows(row)])


def data_tables(rows: Rows) -> Iterator[Table]:
    """Figures over rounds with their ranges, and figures measured once."""
    for row in rows:
        figures = figure_rows(row)
        head = ["figure", "median", "range over rounds", "target"]
        yield Table(
            "Data flow: median and range over rounds",
            [head, *(cells for cells in figures if cells[2])],
        )
        once = [cells[:2] for cells in figures if not cells[2]]
        yield Table("Measured once", [["figure", "value"], *once])


FIGURES_HEAD = ["figure", "median", "range", "target"]


def _median_and_range(row: Mapping[str, Any], name: str, digits: int) -> str:
    if row.get(name) is None:
        return "–"
    low, high = (_digits(end, digits) for end in row["spread"][name])
    return f"{_digits(row[name], digits)} ({low} to {high})"


def _digits(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


# --- evaluate ---

EVALUATE_TITLES = {
    **dict(ROWS),
    "exclusive/significant_share": "Share of latents called exclusive with evidence",
    "training_seconds": "Training, seconds",
    "evaluating_seconds": "Evaluation on activations, seconds",
    "ratio_to_encoder_product": "Evaluation on activations / one encoder product of the same pairs",
    "downstream_seconds": "Evaluation of predictions, seconds",
    "evaluating_peak_bytes": "Memory for the evaluation on activations, MB",
}


def evaluate_tables(rows: Rows) -> Iterator[Table]:
    """Mean and standard deviation over seeds of each architecture on two models, next to its
    nulls."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        case = f"null: {NULLS[row['case']]}" if row["case"] in NULLS else row["case"]
        groups.setdefault(f"{row['architecture']}, {case}", []).append(row)
    ordered = dict(sorted(groups.items(), key=lambda group: "null" in group[0]))
    body = [
        [title, *(_over_seeds(own, name) for own in ordered.values())]
        for name, title in EVALUATE_TITLES.items()
        if any(row.get(name) is not None for row in rows)
    ]
    yield Table(
        "Measures of evaluate: mean ± standard deviation over seeds", [["", *ordered], *body]
    )


def _over_seeds(rows: Rows, name: str) -> str:
    unit = 1e6 if name.endswith("_bytes") else 1
    known = [row[name] / unit for row in rows if row.get(name) is not None]
    if not known:
        return "–"
    mean = number(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {number(statistics.stdev(known))}"
