"""Plots benchmark results, with byte-identical output for identical results."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.planted.options import is_foreign, is_null
from benchmarks.tables.certain_tables import rows_by_case
from benchmarks.tables.tables import COLUMNS, STEP_RATIOS, Rows, in_order, step_name
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS
from sae_lens_dfc.metrics.exclusivity.evidence import MAX_KNOWN, MIN_WORSE

# Mid-lightness colors, visible on both light and dark backgrounds.
COLORS = (
    *("#3b82f6", "#d97706", "#16a34a", "#db2777", "#8b5cf6"),
    *("#0d9488", "#dc2626", "#a16207", "#78808a"),
)
MARKERS = "osD^vPX*h"
INK = "#78808a"
STYLE: Any = {
    # Otherwise element ids are random.
    "svg.hashsalt": "sae_lens_dfc",
    "svg.fonttype": "path",
    "savefig.transparent": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure that is saved when the block ends."""
    # Imported here, because it takes half a second that other commands do not need.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Date": None})


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color, marker and line style of each name; lines are dashed once the colors are used up."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "--" if i >= len(COLORS) else "-",
        }
        for i, name in enumerate(names)
    }


# --- recovery ---


def recovery_plot(rows: Rows, path: Path) -> None:
    """Plot exclusive recall and false exclusive rate against dictionary size and pairing noise."""
    true = [row for row in rows if not row["null"]]
    clean = [row for row in true if row["pairing_noise"] == 0]
    noisy = [row for row in true if row["d_sae_per_feature"] == 1]
    with picture(path, 10, 7.5) as figure:
        axes = figure.subplots(2, 2, sharey="row", squeeze=False)
        for i, column in enumerate(("exclusive_recall", "false_exclusive_rate")):
            _lines(axes[i][0], clean, "d_sae_per_feature", column)
            _lines(axes[i][1], noisy, "pairing_noise", column)
            axes[i][0].set_ylabel(COLUMNS[column])
            axes[i][0].set_ylim(-0.03, 1.03)
        axes[1][0].set_xlabel("latents per feature")
        axes[1][1].set_xlabel("share of wrong pairs (one latent per feature)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _lines(axes: Any, rows: Rows, x_name: str, column: str) -> None:
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    xs = sorted({row[x_name] for row in rows})
    for i, (name, style) in enumerate(styles(names).items()):
        groups = [[r for r in rows if (r[x_name], r["architecture"]) == (x, name)] for x in xs]
        values = [[r[column] for r in group if r.get(column) is not None] for group in groups]
        known = [(x, v) for x, v in zip(xs, values, strict=True) if v]
        # Offset the markers: several architectures overlap at 0 and at 1.
        shift = (i - len(names) / 2) * 0.006 * (max(xs) - min(xs) or 1)
        axes.errorbar(
            [x + shift for x, _ in known],
            [statistics.mean(v) for _, v in known],
            yerr=[_deviation(v) for _, v in known],
            label=name,
            markersize=4,
            capsize=2,
            **style,
        )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# --- planted ---


def planted_plot(rows: Rows, path: Path) -> None:
    """Plot the share of confirmed runs of each architecture with Wilson's 95 % interval, next to
    the null's; without pairs with an unrelated model."""
    rows = [row for row in rows if not is_foreign(row["organism"])]
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    with picture(path, 7, 0.55 * len(names) + 1.2) as figure:
        axes = figure.subplots()
        for shift, null, label in (
            (-0.12, False, "planted"),
            (0.12, True, "null: nothing planted"),
        ):
            scored = [r for r in rows if r["score"] and is_null(r["organism"]) == null]
            counts = [
                [r["score"]["confirmed"] for r in scored if r["architecture"] == n] for n in names
            ]
            known = [(i, sum(c), len(c)) for i, c in enumerate(counts) if c]
            style = (
                {"color": COLORS[-1], "marker": "o", "mfc": "none"}
                if null
                else {"color": COLORS[0], "marker": "o"}
            )
            axes.errorbar(
                [k / n for _, k, n in known],
                [i + shift for i, _, _ in known],
                xerr=_lengths([k / n for _, k, n in known], [wilson(k, n) for _, k, n in known]),
                label=label,
                linestyle="none",
                capsize=3,
                **style,
            )
            for i, k, n in known:
                axes.annotate(f"{k} of {n}", (1.06, i + shift), va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.2)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("share of runs in which the difference is confirmed")
        figure.legend(loc="outside lower center", ncols=2)


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    >>> tuple(round(end, 2) for end in wilson(12, 12)), tuple(round(end, 2) for end in wilson(0, 2))
    ((0.76, 1.0), (0.0, 0.66))
    """
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _lengths(
    middles: Sequence[float], intervals: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """Lengths of each interval below and above its value."""
    below = [max(0.0, m - low) for m, (low, _) in zip(middles, intervals, strict=True)]
    above = [max(0.0, high - m) for m, (_, high) in zip(middles, intervals, strict=True)]
    return below, above


# --- step and data ---


def step_plot(rows: Rows, path: Path) -> None:
    """Plot each configuration's ratios: median and range over rounds."""
    rows = in_order(rows)
    names = [n for n in STEP_RATIOS if any(row.get(n) is not None for row in rows)]
    with picture(path, 9, 0.35 * len(rows) + 1.3) as figure:
        for i, (axes, name) in enumerate(
            zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True)
        ):
            own = [(j, row) for j, row in enumerate(rows) if row.get(name) is not None]
            _ranges(axes, own, name, COLORS[i])
            better = "lower" if name.startswith("ratio") else "higher"
            axes.set_xlabel(f"{STEP_RATIOS[name][0]}\n({better} is better)")
            axes.axvline(1, color=INK, linestyle=":", linewidth=1)
            axes.set_xlim(left=0)
            axes.set_yticks(range(len(rows)), [step_name(row) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)


def data_plot(rows: Rows, path: Path) -> None:
    """Plot the data pipeline's ratios: median and range over rounds, with the targets."""
    (row,) = rows
    names = [name for name in row["spread"] if name.endswith(("_ratio", "_epoch", "_disk"))]
    with picture(path, 8, 0.4 * len(names) + 1.1) as figure:
        axes = figure.subplots()
        for i, name in enumerate(names):
            _ranges(axes, [(i, row)], name, COLORS[0])
            if name in row["targets"]:
                limit = float(row["targets"][name].split()[1])
                axes.plot([limit], [i], marker="|", markersize=22, color=COLORS[1])
        axes.set_yticks(range(len(names)), [_with_target(row, name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.axvline(1, color=INK, linestyle=":", linewidth=1)
        axes.set_xlabel("ratio: median and range over rounds; vertical bar: target")


def _with_target(row: Mapping[str, Any], name: str) -> str:
    said = name.replace("_", " ")
    return f"{said} ({row['targets'][name]})" if name in row["targets"] else said


def _ranges(
    axes: Any, rows: Sequence[tuple[int, Mapping[str, Any]]], name: str, color: str
) -> None:
    middles = [row[name] for _, row in rows]
    axes.errorbar(
        middles,
        [i for i, _ in rows],
        xerr=_lengths(middles, [row["spread"][name] for _, row in rows]),
        linestyle="none",
        marker="o",
        capsize=3,
        color=color,
    )


# --- evaluate ---

CALLED = "share called exclusive with evidence"
PANELS: dict[str, dict[str, str]] = {
    "explained variance": {"explained_variance/a": "A", "explained_variance/b": "B"},
    "loss recovered from mean ablation": {
        "loss_recovered_from_mean/a": "A",
        "loss_recovered_from_mean/b": "B",
    },
    "KL without exclusive latents, nats": {
        "kl/a/without_exclusive": "A",
        "kl/b/without_exclusive": "B",
    },
    "predicted from the other model": {
        "cross_reconstruction/a_from_b": "A from B",
        "cross_reconstruction/b_from_a": "B from A",
    },
    "firing predicted from the other model (AUC)": {
        "transfer/auc/a_exclusive": "A only",
        "transfer/auc/b_exclusive": "B only",
        "transfer/auc/shared": "shared",
    },
    "latent scaling of the error": {
        "latent_scaling/nu_error/a_exclusive": "A only",
        "latent_scaling/nu_error/b_exclusive": "B only",
        "latent_scaling/nu_error/shared": "shared",
    },
    "share of dead latents": {
        "dead_fraction/a_exclusive": "A only",
        "dead_fraction/b_exclusive": "B only",
        "dead_fraction/shared": "shared",
    },
    CALLED: {"exclusive/significant_share": "all"},
}


def evaluate_plot(rows: Rows, path: Path) -> None:
    """Plot each measure on two models next to its nulls, one dot per seed."""
    groups = list(dict.fromkeys((row["architecture"], row["case"]) for row in rows))
    architectures = list(dict.fromkeys(architecture for architecture, _ in groups))
    cases = list(dict.fromkeys(case for _, case in groups))
    with picture(path, 12, 6.5) as figure:
        panels = figure.subplots(2, 4).ravel()
        for axes, (title, measures) in zip(panels, PANELS.items(), strict=True):
            for i, group in enumerate(groups):
                own = [row for row in rows if (row["architecture"], row["case"]) == group]
                color = COLORS[architectures.index(group[0])]
                shift = (i - (len(groups) - 1) / 2) * 0.8 / len(groups)
                _dots(axes, own, measures, shift, color, MARKERS[cases.index(group[1])])
            axes.set_xticks(range(len(measures)), list(measures.values()))
            axes.set_xlim(-0.6, len(measures) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.set_title(title, fontsize=9)
            if title == CALLED:
                # Usually all values are 0, for which automatic axis limits are unsuitable.
                axes.set_ylim(-0.002, max(0.05, axes.get_ylim()[1]))
        for architecture, case in groups:
            label = f"{architecture}, " + (f"null: {NULLS[case]}" if case in NULLS else case)
            color, marker = COLORS[architectures.index(architecture)], MARKERS[cases.index(case)]
            panels[0].plot([], [], label=label, color=color, marker=marker, **_fill(marker))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(cases))


def _dots(
    axes: Any, rows: Rows, measures: Mapping[str, str], shift: float, color: str, marker: str
) -> None:
    for i, name in enumerate(measures):
        values = [row[name] for row in rows if row.get(name) is not None]
        axes.plot([i + shift] * len(values), values, color=color, marker=marker, **_fill(marker))


def _fill(marker: str) -> dict[str, Any]:
    """Filled markers for the two models, empty ones for nulls."""
    return {"linestyle": "none", "markersize": 5, "mfc": None if marker == MARKERS[0] else "none"}


def certain_plot(rows: Rows, path: Path) -> None:
    """Plot both measures of the evidence for each judged latent, one panel per case."""
    cases = rows_by_case(rows)
    with picture(path, 3.4 * len(cases), 3.6) as figure:
        panels = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (case, own) in zip(panels, cases.items(), strict=True):
            for side, label, color in zip(
                (A_EXCLUSIVE, B_EXCLUSIVE), ("A", "B"), COLORS[:2], strict=True
            ):
                scores = [row["score"][side] for row in own]
                points = [
                    point
                    for score in scores
                    for point in zip(
                        score["known"], score["target_worse"], score["is_called"], strict=True
                    )
                ]
                for is_called in (False, True):
                    x, y = ([p[i] for p in points if p[2] == is_called] for i in (0, 1))
                    name = f"{label}'s, {'called' if is_called else 'not called'}"
                    axes.scatter(
                        x,
                        y,
                        s=9,
                        color=color,
                        label=name,
                        facecolors=color if is_called else "none",
                        linewidths=0.7,
                    )
            axes.axvline(MAX_KNOWN, color="gray", linewidth=0.8)
            axes.axhline(MIN_WORSE, color="gray", linewidth=0.8)
            axes.set_title(case, fontsize=9)
            axes.set_xlabel("share known to the other model")
            axes.set_xlim(-0.2, 1.2)
        panels[0].set_ylabel("share of firings after which\nthe other model predicts worse")
        panels[0].legend(fontsize=7)
