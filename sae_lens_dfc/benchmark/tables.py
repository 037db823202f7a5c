"""Results of the recovery benchmark as tables and as a picture: means and standard deviations over seeds."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_dfc.benchmark.peers import PEERS
from sae_lens_dfc.measures import spread

Rows = Sequence[Mapping[str, Any]]

COLUMNS = {
    "exclusive_recall": "exclusive recall",
    "exclusive_learned": "learned anywhere",
    "false_exclusive_rate": "false exclusive rate",
    "exclusive_called": "called exclusive",
    "evidence_recall": "recall of calls with evidence",
    "evidence_precision": "precision of calls with evidence",
    "evidence_called_share": "share of latents called with evidence",
    "leakage": "leakage",
    "shared_recall": "shared recall",
    "explained_variance/a": "EV A",
    "explained_variance/b": "EV B",
    "l0": "L0",
    "training_time": "training time, in batchtopk_crosscoder's",
}


BASELINE = "batchtopk_crosscoder"

FREQUENCY_COLUMNS = {"exclusive_recall": "exclusive recall", "shared_recall": "shared recall"}


class Table(NamedTuple):
    """A title and cells, the first line of which is the head."""

    title: str
    cells: list[list[str]]

    def markdown(self) -> str:
        head, *body = ("| " + " | ".join(line) + " |" for line in self.cells)
        return "\n".join([f"**{self.title}**\n", head, "|---" * len(self.cells[0]) + "|", *body])


def tables(rows: Rows) -> Iterator[Table]:
    """An overview, and a table for each dictionary size, for frequencies, for each level of pairing noise and the null."""
    rows = with_training_times(rows)
    clean = [row for row in rows if not row["null"] and row["pairing_noise"] == 0]
    noisy = [row for row in rows if row["pairing_noise"] > 0]
    null = [row for row in rows if row["null"]]
    sizes = sorted({row["d_sae_per_feature"] for row in clean})
    cases = {f"{size:g} latents a feature": _at(clean, "d_sae_per_feature", size) for size in sizes}
    noises = sorted({row["pairing_noise"] for row in noisy})
    cases |= {
        f"{noise:.0%} of the pairs wrong": _at(noisy, "pairing_noise", noise) for noise in noises
    }
    yield Table("Exclusive recall; false exclusive rate", _overview(cases, null))
    for title, group in cases.items():
        yield Table(title, _cells(group))
    middle = _at(clean, "d_sae_per_feature", 1)
    yield Table("1 latents a feature, by the features' frequency", _cells_by_frequency(middle))
    yield Table("Null: no feature is exclusive", _cells(null))


def with_training_times(rows: Rows) -> Rows:
    """The rows, each with its `training_time` over that of the BatchTopK crosscoder of the same toy pair and size.

    None where either is not known, or where they are not of one commit: a time is worth something beside those of one run.

    >>> run = {"d_sae": 8, "seed": 0, "pairing_noise": 0.0, "null": False, "commit": "a"}
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
    return tuple(row[name] for name in ("d_sae", "seed", "pairing_noise", "null", "commit"))


def _over(seconds: float | None, ours: float | None) -> float | None:
    return None if seconds is None or ours is None else seconds / ours


def _at(rows: Rows, name: str, value: float) -> Rows:
    return [row for row in rows if row[name] == value]


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
    return [["", *COLUMNS.values()]] + [
        [name, *(spread(_values(rows, name, column)) for column in COLUMNS)] for name in names
    ]


def _values(rows: Rows, name: str, column: str) -> list[float]:
    values = [row.get(column) for row in rows if row["architecture"] == name]
    return [float(value) for value in values if value is not None]


def plot(rows: Rows, path: Path) -> None:
    """Exclusive recall and false exclusive rate against dictionary size and against pairing noise."""
    # Half a second that every other command need not wait.
    from matplotlib.figure import Figure

    true = [row for row in rows if not row["null"]]
    clean = [row for row in true if row["pairing_noise"] == 0]
    noisy = [row for row in true if row["d_sae_per_feature"] == 1]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", squeeze=False)
    for i, column in enumerate(("exclusive_recall", "false_exclusive_rate")):
        _lines(axes[i][0], clean, "d_sae_per_feature", column)
        _lines(axes[i][1], noisy, "pairing_noise", column)
        axes[i][0].set_ylabel(COLUMNS[column])
        axes[i][0].set_ylim(-0.03, 1.03)
    axes[1][0].set_xlabel("latents per feature")
    axes[1][1].set_xlabel("share of wrong pairs (one latent per feature)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _lines(axes: Any, rows: Rows, x_name: str, column: str) -> None:
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    for i, name in enumerate(names):
        xs = sorted({row[x_name] for row in rows})
        groups = [[r for r in rows if r[x_name] == x] for x in xs]
        values = [_values(group, name, column) for group in groups]
        known = [(x, v) for x, v in zip(xs, values, strict=True) if v]
        # Marks side by side: several architectures lie on one another at 0 and at 1.
        shift = (i - len(names) / 2) * 0.006 * (max(xs) - min(xs) or 1)
        axes.errorbar(
            [x + shift for x, _ in known],
            [statistics.mean(v) for _, v in known],
            yerr=[statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in known],
            label=name,
            color=f"C{i % 10}",
            # Another library's stands out, and there are more lines than colours.
            marker="s" if name in PEERS else "o",
            linestyle="--" if name in PEERS else "-",
            markersize=4,
            capsize=2,
        )
    axes.grid(alpha=0.3)
