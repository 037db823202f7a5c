"""The measures that are shown, in the terminal and on the page: which, in what order, beside which nulls."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae_lens_dfc.metrics.spread import SE
from sae_lens_dfc.nulls import NULLS


class MeasureGroup(NamedTuple):
    """Measures that are read together."""

    title: str
    note: str
    """What the numbers mean."""
    rows: list[tuple[str, str]]
    """Key in metrics.json, and title."""


GROUPS = [
    MeasureGroup(
        "Reconstruction",
        "How much of each model the crosscoder rebuilds, on activations normalised as in training. 1 is all.",
        [
            ("explained_variance/a", "Explained variance, A"),
            ("explained_variance/b", "Explained variance, B"),
            ("explained_variance_median/a", "Explained variance, A, median over dimensions"),
            ("explained_variance_median/b", "Explained variance, B, median over dimensions"),
            (
                "explained_variance/a/token_decile_0",
                "Explained variance, A, rarest tenth of tokens",
            ),
            (
                "explained_variance/b/token_decile_0",
                "Explained variance, B, rarest tenth of tokens",
            ),
            ("cosine/a", "Cosine of reconstruction, A"),
            ("cosine/b", "Cosine of reconstruction, B"),
            ("norm_ratio/a", "Length of reconstruction, A"),
            ("norm_ratio/b", "Length of reconstruction, B"),
        ],
    ),
    MeasureGroup(
        "What one model tells of the other",
        "Share of one model's variance that is explained when only the other is read. What an affine map explains needs no crosscoder.",
        [
            ("cross_reconstruction/a_from_b", "A explained when only B is read"),
            ("cross_reconstruction/b_from_a", "B explained when only A is read"),
            ("stitching/b_to_a", "A explained by an affine map from B"),
            ("stitching/a_to_b", "B explained by an affine map from A"),
        ],
    ),
    MeasureGroup(
        "What the models make of it",
        "Both models go on from the reconstruction. Loss recovered: 0 is the mean activation in place of all, 1 is the untouched model. KL: from the untouched model, per token.",
        [
            ("loss_recovered_from_mean/a", "Loss recovered from mean ablation, A"),
            ("loss_recovered_from_mean/b", "Loss recovered from mean ablation, B"),
            ("loss_recovered_from_mean/a/shared_only", "… A, by the shared latents alone"),
            ("loss_recovered_from_mean/b/shared_only", "… B, by the shared latents alone"),
            ("loss_recovered_from_mean/a/exclusive_only", "… A, by its exclusive latents alone"),
            ("loss_recovered_from_mean/b/exclusive_only", "… B, by its exclusive latents alone"),
            ("kl/a/without_exclusive", "KL without the exclusive latents, A, nats"),
            ("kl/b/without_exclusive", "KL without the exclusive latents, B, nats"),
        ],
    ),
    MeasureGroup(
        "Partitions and sparsity",
        "How many latents there are, how many are active on a pair, and how many never are.",
        [
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
        ],
    ),
    MeasureGroup(
        "Is it exclusive? Evidence from activations",
        "Medians over latents; in the plot with the range from the 5th to the 95th percentile. Exclusive latents have scaling near 0 and AUC near 0.5. Compare candidates with the shared latents of the same run: one model twice is easy for every map.",
        [
            (
                "latent_scaling/nu_error/a_exclusive",
                "Latent scaling, error, A's candidates, median",
            ),
            (
                "latent_scaling/nu_error/b_exclusive",
                "Latent scaling, error, B's candidates, median",
            ),
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
            (
                "transfer/auc/a_exclusive",
                "Firing told by the other model (AUC), A's candidates, median",
            ),
            (
                "transfer/auc/b_exclusive",
                "Firing told by the other model (AUC), B's candidates, median",
            ),
            ("transfer/auc/shared", "Firing told by the other model (AUC), shared latents, median"),
        ],
    ),
    MeasureGroup(
        "Is it exclusive? What steering does",
        "Share of what steering brings to a latent's own model that it does not bring to the other. 0: the other follows. Random directions are as exclusive as nothing can be: without a distance from them a score says nothing.",
        [
            (
                "behaviour/a_exclusive",
                "Steering that the other model does not follow, A's candidates",
            ),
            (
                "behaviour/b_exclusive",
                "Steering that the other model does not follow, B's candidates",
            ),
            ("behaviour/shared", "Steering that the other model does not follow, shared latents"),
            (
                "behaviour/random",
                "Steering that the other model does not follow, random directions",
            ),
        ],
    ),
    MeasureGroup(
        "Calls",
        "How many candidates could be judged, and how many are called exclusive, at a false discovery rate of 5 %.",
        [
            ("exclusive/judged/a_exclusive", "A's candidates that fire often enough to be judged"),
            ("exclusive/judged/b_exclusive", "B's candidates that fire often enough to be judged"),
            ("exclusive/called/a_exclusive", "Called exclusive to A, with evidence"),
            ("exclusive/called/b_exclusive", "Called exclusive to B, with evidence"),
        ],
    ),
    MeasureGroup(
        "Data and checks",
        "",
        [
            ("leak", "Leak: largest forbidden weight"),
            ("alignment/coverage_a", "A's tokens paired"),
            ("alignment/coverage_b", "B's tokens paired"),
            ("pairs_trained", "Distinct pairs trained on"),
            ("pairs_evaluated", "Held-out pairs evaluated"),
        ],
    ),
]
ROWS = [row for group in GROUPS for row in group.rows]
COLUMNS = [
    ("", "this run"),
    ("baseline/batchtopk/", "BatchTopK crosscoder"),
    ("baseline/pca/", "PCA, k components"),
    *((f"null/{name}/", f"null: {title}") for name, title in NULLS.items()),
]


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
        [title, *(cell(metrics, prefix + key) for prefix, _ in columns)]
        for key, title in ROWS
        if any(prefix + key in metrics for prefix, _ in columns)
    ]
    return ["measure", *(title for _, title in columns)], rows


def cell(metrics: Mapping[str, float], key: str) -> str:
    """The number, with its standard error where that is known."""
    error = metrics.get(key + SE)
    return number(metrics.get(key)) + ("" if error is None else f" ± {number(error)}")


def number(value: float | None) -> str:
    """A number as it is shown; empty where there is none.

    >>> number(0.12345), number(12.345), number(1234.5), number(3), number(None)
    ('0.123', '12.35', '1,234', '3', '')
    """
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
