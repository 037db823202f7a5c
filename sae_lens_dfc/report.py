"""One self-contained HTML page about a run: settings, measures beside their null, and latents in context."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lens_dfc.latents import LatentCard
from sae_lens_dfc.metrics.spread import SE
from sae_lens_dfc.nulls import NULLS

ROWS = [
    ("explained_variance/a", "Explained variance, A"),
    ("explained_variance/b", "Explained variance, B"),
    ("explained_variance_median/a", "Explained variance, A, median over dimensions"),
    ("explained_variance_median/b", "Explained variance, B, median over dimensions"),
    ("explained_variance/a/token_decile_0", "Explained variance, A, rarest tenth of tokens"),
    ("explained_variance/b/token_decile_0", "Explained variance, B, rarest tenth of tokens"),
    ("cosine/a", "Cosine of reconstruction, A"),
    ("cosine/b", "Cosine of reconstruction, B"),
    ("norm_ratio/a", "Length of reconstruction, A"),
    ("norm_ratio/b", "Length of reconstruction, B"),
    ("cross_reconstruction/a_from_b", "A explained when only B is read"),
    ("cross_reconstruction/b_from_a", "B explained when only A is read"),
    ("stitching/b_to_a", "A explained by an affine map from B"),
    ("stitching/a_to_b", "B explained by an affine map from A"),
    ("loss_recovered_from_mean/a", "Loss recovered from mean ablation, A"),
    ("loss_recovered_from_mean/b", "Loss recovered from mean ablation, B"),
    ("loss_recovered_from_mean/a/shared_only", "… A, by the shared latents alone"),
    ("loss_recovered_from_mean/b/shared_only", "… B, by the shared latents alone"),
    ("loss_recovered_from_mean/a/exclusive_only", "… A, by its exclusive latents alone"),
    ("loss_recovered_from_mean/b/exclusive_only", "… B, by its exclusive latents alone"),
    ("kl/a/without_exclusive", "KL without the exclusive latents, A, nats"),
    ("kl/b/without_exclusive", "KL without the exclusive latents, B, nats"),
    ("latents/a_exclusive", "Latents, A-exclusive"),
    ("latents/b_exclusive", "Latents, B-exclusive"),
    ("latents/shared", "Latents, shared"),
    ("l0", "Active latents on a pair (L0)"),
    ("l0/a_exclusive", "L0, A-exclusive"),
    ("l0/b_exclusive", "L0, B-exclusive"),
    ("l0/shared", "L0, shared"),
    ("dead_fraction/a_exclusive", "Dead share, A-exclusive"),
    ("dead_fraction/b_exclusive", "Dead share, B-exclusive"),
    ("dead_fraction/shared", "Dead share, shared"),
    ("relative_decoder_norm/min", "Relative decoder norm of shared latents, least"),
    ("relative_decoder_norm/median", "Relative decoder norm of shared latents, median"),
    ("relative_decoder_norm/max", "Relative decoder norm of shared latents, largest"),
    ("decoder_cosine/a_to_b", "Cosine of shared latents' decoders, A's moved to B, median"),
    ("latent_scaling/nu_error/a_exclusive", "Latent scaling, error, A's candidates, median"),
    ("latent_scaling/nu_error/b_exclusive", "Latent scaling, error, B's candidates, median"),
    ("latent_scaling/nu_error/shared", "Latent scaling, error, shared latents, median"),
    (
        "latent_scaling/nu_reconstruction/a_exclusive",
        "Latent scaling, reconstruction, A's candidates, median",
    ),
    (
        "latent_scaling/nu_reconstruction/b_exclusive",
        "Latent scaling, reconstruction, B's candidates, median",
    ),
    (
        "latent_scaling/nu_reconstruction/shared",
        "Latent scaling, reconstruction, shared latents, median",
    ),
    ("transfer/auc/a_exclusive", "Firing told by the other model (AUC), A's candidates, median"),
    ("transfer/auc/b_exclusive", "Firing told by the other model (AUC), B's candidates, median"),
    ("transfer/auc/shared", "Firing told by the other model (AUC), shared latents, median"),
    ("behaviour/a_exclusive", "Steering that the other model does not follow, A's candidates"),
    ("behaviour/b_exclusive", "Steering that the other model does not follow, B's candidates"),
    ("behaviour/shared", "Steering that the other model does not follow, shared latents"),
    ("behaviour/random", "Steering that the other model does not follow, random directions"),
    ("exclusive/judged/a_exclusive", "A's candidates that fire often enough to be judged"),
    ("exclusive/judged/b_exclusive", "B's candidates that fire often enough to be judged"),
    ("exclusive/called/a_exclusive", "Called exclusive to A, with evidence"),
    ("exclusive/called/b_exclusive", "Called exclusive to B, with evidence"),
    ("leak", "Leak: largest forbidden weight"),
    ("alignment/coverage_a", "A's tokens paired"),
    ("alignment/coverage_b", "B's tokens paired"),
    ("pairs_trained", "Distinct pairs trained on"),
    ("pairs_evaluated", "Held-out pairs evaluated"),
]
COLUMNS = [
    ("", "this run"),
    ("baseline/batchtopk/", "BatchTopK crosscoder"),
    ("baseline/pca/", "PCA, k components"),
    *((f"null/{name}/", f"null: {title}") for name, title in NULLS.items()),
]
PARTITION_TITLES = {
    "a_exclusive": "Latents only model A may use",
    "b_exclusive": "Latents only model B may use",
    "shared": "Latents both models use",
}


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    name_a: str
    name_b: str
    settings: Mapping[str, Any]
    """Settings of the run by name."""
    metrics: Mapping[str, float]
    """Measures, as in metrics.json."""
    histogram: Mapping[str, list[int]]
    """Number of latents by relative decoder norm, from 0 to 1, by partition."""
    cards: list[LatentCard]


def measures_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the measures, without columns and rows that hold nothing.

    >>> measures_table({"l0": 31.5, "null/self/l0": 30.0})
    (['measure', 'this run', 'null: model A twice'], [['Active latents on a pair (L0)', '31.50', '30.00']])
    """
    columns = [
        (prefix, title)
        for prefix, title in COLUMNS
        if any(prefix + key in metrics for key, _ in ROWS)
    ]
    rows = [
        [title, *(_cell(metrics, prefix + key) for prefix, _ in columns)]
        for key, title in ROWS
        if any(prefix + key in metrics for prefix, _ in columns)
    ]
    return ["measure", *(title for _, title in columns)], rows


def _cell(metrics: Mapping[str, float], key: str) -> str:
    """The number, with its standard error where that is known."""
    error = metrics.get(key + SE)
    return _number(metrics.get(key)) + ("" if error is None else f" ± {_number(error)}")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """The measures as a table for the terminal.

    >>> print(text_table(["measure", "run"], [["L0", "31.50"]]))
    measure    run
    L0       31.50
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in [head, *rows]
    ]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, a dash of nothing.

    >>> spread([1.0, 2.0]), spread([1.0]), spread([])
    ('1.50 ± 0.71', '1.00', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def render_report(data: ReportData) -> str:
    """The page. Everything that comes from a data set, a model's name or a setting is escaped."""
    head, rows = measures_table(data.metrics)
    environment = Environment(
        loader=PackageLoader("sae_lens_dfc"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        data=data,
        head=head,
        rows=rows,
        bars=_bars(data.histogram),
        groups=[
            (name, title, [card for card in data.cards if card.partition == name])
            for name, title in PARTITION_TITLES.items()
        ],
        has_null=any(key.startswith("null/") for key in data.metrics),
    )


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    partition: str
    label: str


def _bars(histogram: Mapping[str, list[int]]) -> list[_Bar]:
    """Stacked bars in a box of 100 x 100, heights on a log scale so that a single latent still shows."""
    n_bins = max((len(counts) for counts in histogram.values()), default=0)
    totals = [sum(counts[i] for counts in histogram.values()) for i in range(n_bins)]
    tallest = math.log10(1 + max(totals, default=1)) or 1.0
    bars: list[_Bar] = []
    for i in range(n_bins):
        base = 0.0
        height = 100 * math.log10(1 + totals[i]) / tallest
        for partition, counts in histogram.items():
            if counts[i] == 0:
                continue
            part = height * counts[i] / totals[i]
            label = f"{counts[i]} {partition} between {i / n_bins:.2f} and {(i + 1) / n_bins:.2f}"
            bars.append(
                _Bar(100 * i / n_bins, 100 - base - part, 90 / n_bins, part, partition, label)
            )
            base += part
    return bars
