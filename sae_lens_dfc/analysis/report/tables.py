"""Selects, orders and formats the measures shown in the terminal and in the report, next to their
nulls."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae_lens_dfc.analysis.causal.divergence import BITS, BY_EVIDENCE, BY_GRADIENT, PAIRS, SIZES
from sae_lens_dfc.analysis.causal.divergence import PREFIX as DIVERGENCE_PREFIX
from sae_lens_dfc.analysis.causal.mapped_loss import PREFIX, named_groups
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS
from sae_lens_dfc.stats.jackknife import SE

Row = tuple[str, str]
"""Key in metrics.json, and title."""
PARTITIONS = {A_EXCLUSIVE: "A-exclusive", B_EXCLUSIVE: "B-exclusive", SHARED: "shared"}
OF_BOTH = {
    "explained_variance": "explained variance of the model",
    "l0": "active latents among those exported (L0)",
}
OF_CODE = {
    "feature_acts_explained_variance": "explained variance of the crosscoder's activations",
    "firing_precision": "firing precision against the crosscoder",
    "firing_recall": "firing recall against the crosscoder",
    "firing_recall_median": "firing recall, median over latents",
}


class MeasureGroup(NamedTuple):
    """A group of related measures."""

    title: str
    note: str
    """Explanation of the numbers."""
    rows: list[Row]


def _of_each(key: str, title: str) -> list[Row]:
    """A row of each model, m and M, beside the other model, o and O."""
    return [(key.format(m=m, o=o), title.format(M=m.upper(), O=o.upper())) for m, o in ("ab", "ba")]


def _of_each_partition(key: str, title: str) -> list[Row]:
    return [(key.format(name), title.format(said)) for name, said in PARTITIONS.items()]


def _of_candidates(key: str, title: str) -> list[Row]:
    """A row of each model's candidates, and of the shared latents."""
    return [
        *_of_each(f"{key}/{{m}}_exclusive", title.format("{M}'s candidates")),
        (f"{key}/shared", title.format("shared latents")),
    ]


_ORDERS = {BY_EVIDENCE: "in the order of the screening", BY_GRADIENT: "by gradient"}
CHANGES = {
    **{f"{order}/{n}": f"{n} latents, {said}" for order, said in _ORDERS.items() for n in SIZES},
    **{
        f"random_{order}/{n}": f"{n} random directions for latents {said}"
        for order, said in _ORDERS.items()
        for n in SIZES
    },
    **{f"components/{n}": f"{n} main directions of the difference" for n in SIZES},
    "latents": "all latents",
    "latents_and_bias": "all latents and the bias",
    "mean": "mean difference",
    "full_difference": "full difference",
}
"""What is removed in a model, by the suffix of its metric of divergence explained."""


KNOWS_MORE = MeasureGroup(
    "Which model knows more",
    "Rise of a model's next-token loss, in nats per token, when it continues from the other model's activations, mapped by an affine map. 0: it loses nothing; with its mean activation a model keeps nothing. A model knows more if its rise is the larger and the other's untouched loss on the same text is more than 1.25 times its own: of two models that know a text equally well, the wider one has the larger rise.",
    [
        *_of_each("mapped_loss/rise/{m}", "Rise of {M}'s loss, given {O}'s activations"),
        ("mapped_loss/b_minus_a", "Rise of B's loss minus A's"),
        ("mapped_loss/b_over_a", "B's untouched loss on this text over A's"),
        *_of_each("mapped_loss/rise_of_mean/{m}", "Rise of {M}'s loss, given its mean"),
    ],
)
DIVERGENCE = MeasureGroup(
    "Divergence explained",
    "Share of the divergence between the two models' next-token predictions (Jensen-Shannon) that is removed when latents' parts of the models' difference are removed in one model: taken out where that model alone writes them, added where the other alone does. 1: the models then predict the same. Random directions of the same size are the null. The main directions of the activations' difference, and its mean, need no crosscoder. The full difference is the other model's activation at every pair.",
    [
        (BITS, "Divergence of the predictions, bits"),
        (PAIRS, "Pairs at which it is measured"),
        *(
            (f"{DIVERGENCE_PREFIX}{m}/{change}", f"In {m.upper()}: {title}")
            for m in "ab"
            for change, title in CHANGES.items()
        ),
    ],
)
GROUPS = [
    MeasureGroup(
        "Reconstruction",
        "How much of each model's activations the crosscoder reconstructs, normalized as in training. 1 is perfect.",
        [
            *_of_each("explained_variance/{m}", "Explained variance, {M}"),
            *_of_each(
                "explained_variance_median/{m}",
                "Explained variance, {M}, median over dimensions",
            ),
            *_of_each(
                "explained_variance/{m}/token_decile_0",
                "Explained variance, {M}, rarest tenth of tokens",
            ),
            *_of_each("cosine/{m}", "Cosine of reconstruction, {M}"),
            *_of_each("norm_ratio/{m}", "Norm ratio of reconstruction, {M}"),
        ],
    ),
    MeasureGroup(
        "What one model predicts about the other",
        "Share of one model's variance explained when only the other model is encoded. An affine map, which needs no crosscoder, is the baseline.",
        [
            *_of_each(
                "cross_reconstruction/{m}_from_{o}", "{M} explained when only {O} is encoded"
            ),
            *_of_each("affine_map/{o}_to_{m}", "{M} explained by an affine map from {O}"),
        ],
    ),
    KNOWS_MORE,
    MeasureGroup(
        "Downstream effect",
        "Both models run on the reconstruction. Loss recovered: 0 is mean ablation, 1 is the untouched model. KL: from the untouched model, per token.",
        [
            *_of_each("loss_recovered_from_mean/{m}", "Loss recovered from mean ablation, {M}"),
            *_of_each(
                "loss_recovered_from_mean/{m}/shared_only", "… {M}, by the shared latents alone"
            ),
            *_of_each(
                "loss_recovered_from_mean/{m}/exclusive_only",
                "… {M}, by its exclusive latents alone",
            ),
            *_of_each("kl/{m}/without_exclusive", "KL without the exclusive latents, {M}, nats"),
        ],
    ),
    DIVERGENCE,
    MeasureGroup(
        "Partitions and sparsity",
        "Number of latents, active latents per pair (L0), and share of latents that never fire (dead).",
        [
            *_of_each_partition("latents/{}", "Latents, {}"),
            ("l0", "Active latents per pair (L0)"),
            *_of_each_partition("l0/{}", "L0, {}"),
            *_of_each_partition("dead_fraction/{}", "Dead share, {}"),
            ("relative_decoder_norm/min", "Relative decoder norm of shared latents, minimum"),
            ("relative_decoder_norm/median", "Relative decoder norm of shared latents, median"),
            ("relative_decoder_norm/max", "Relative decoder norm of shared latents, maximum"),
            (
                "decoder_cosine/a_to_b",
                "Cosine of shared latents' decoders, A's mapped to B, median",
            ),
        ],
    ),
    MeasureGroup(
        "Is it exclusive? Evidence from activations",
        "Medians over latents; bars in the plot span the 5th to 95th percentile. The other model knows little of an exclusive latent; latent scaling near 0 and AUROC near 0.5 agree. Compare candidates with the shared latents of the same run, because the null of model A twice is too easy.",
        [
            *_of_each("known/{m}_exclusive", "Share known to {O}, {M}'s candidates, median"),
            ("known/shared", "Share known to the other model, shared latents, median"),
            *_of_each(
                "target_worse/{m}_exclusive",
                "Firings after which {O} predicts worse, {M}'s candidates",
            ),
            ("target_worse/shared", "Firings after which the other predicts worse, shared latents"),
            *_of_candidates("latent_scaling/nu_error", "Latent scaling, error, {}, median"),
            *_of_candidates(
                "latent_scaling/nu_reconstruction", "Latent scaling, reconstruction, {}, median"
            ),
            *_of_candidates(
                "transfer/auc", "Firing predicted from the other model (AUROC), {}, median"
            ),
        ],
    ),
    MeasureGroup(
        "Is it exclusive? Evidence from steering",
        "Share of steering's effect on a latent's source model that does not occur in the other model. 0: the other model changes in the same way. Random directions give the score of an arbitrary direction; a score that does not differ from theirs is no evidence.",
        [
            *_of_candidates("behavior", "Steering effect absent from the other model, {}"),
            ("behavior/random", "Steering effect absent from the other model, random directions"),
        ],
    ),
    MeasureGroup(
        "Exclusive latents",
        "Number of candidates that could be judged, and number that are exclusive with evidence, at a false discovery rate of 5 %. Power is the probability that a judged candidate would have been found exclusive, had the other model known a quarter of it and predicted worse after three quarters of its firings.",
        [
            *_of_each("exclusive/judged/{m}_exclusive", "{M}'s candidates that could be judged"),
            *_of_each("exclusive/significant/{m}_exclusive", "Exclusive to {M}, with evidence"),
            *_of_each(
                "exclusive/power/{m}_exclusive", "Power for a clear difference, {M}'s candidates"
            ),
        ],
    ),
    MeasureGroup(
        "Data and checks",
        "",
        [
            ("max_forbidden_weight", "Largest forbidden weight"),
            *_of_each("alignment/coverage_{m}", "{M}'s tokens paired"),
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


def groups_of(metrics: Mapping[str, float]) -> list[MeasureGroup]:
    """The groups of measures without those that were not measured, with the rows of each group of
    text that was measured by itself.

    >>> [group.rows for group in groups_of({"mapped_loss/pt/b_minus_a": 1.0})]
    [[('mapped_loss/pt/b_minus_a', "Rise of B's loss minus A's, on pt")]]
    """
    by_group = [
        (key.replace(PREFIX, f"{PREFIX}{name}/", 1), f"{title}, on {name}")
        for name in named_groups(metrics)
        for key, title in KNOWS_MORE.rows
    ]
    whole = KNOWS_MORE._replace(rows=[*KNOWS_MORE.rows, *by_group])
    groups = (whole if group is KNOWS_MORE else group for group in GROUPS)
    measured = [
        group._replace(
            rows=[row for row in group.rows if any(p + row[0] in metrics for p, _ in COLUMNS)]
        )
        for group in groups
    ]
    return [group for group in measured if group.rows]


def columns_of(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Prefix and title of the columns that have values."""
    return [(p, title) for p, title in COLUMNS if any(p + key in metrics for key, _ in ROWS)]


def measures_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of measures, without empty columns and rows.

    >>> measures_table({"l0": 31.5, "null/self/l0": 30.0})
    (['measure', 'this run', 'null: model A twice'], [['Active latents per pair (L0)', '31.50', '30.00']])
    """
    columns = columns_of(metrics)
    rows = [
        [title, *(cell(metrics, prefix + key) for prefix, _ in columns)]
        for group in groups_of(metrics)
        for key, title in group.rows
    ]
    return ["measure", *(title for _, title in columns)], rows


def divergence_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of divergence explained, with a column for each model.

    >>> divergence_table({"divergence/bits": 0.1, "divergence/b/mean": 0.25})
    (['removed', 'in A', 'in B'], [['nothing (bits)', '0.100', '0.100'], ['mean difference', '', '0.250']])
    """
    bits = cell(metrics, BITS)
    rows = [
        [title, *(cell(metrics, f"{DIVERGENCE_PREFIX}{m}/{change}") for m in "ab")]
        for change, title in CHANGES.items()
    ]
    return ["removed", "in A", "in B"], [
        ["nothing (bits)", bits, bits],
        *(row for row in rows if any(row[1:])),
    ]


def cell(metrics: Mapping[str, float], key: str) -> str:
    """The number, with its standard error if known."""
    error = metrics.get(key + SE)
    return number(metrics.get(key)) + ("" if error is None else f" ± {number(error)}")


def number(value: float | None) -> str:
    """Format a number for display; empty for None.

    >>> number(0.12345), number(12.345), number(1234.5), number(3), number(None)
    ('0.123', '12.35', '1,234', '3', '')
    """
    if value is None:
        return ""
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation; a dash for no values.

    >>> spread([1.0, 2.0]), spread([1.0]), spread([])
    ('1.50 ± 0.71', '1.00', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def difference_tables(
    difference: Mapping[str, float],
) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of two tables: SAE against crosscoder, and the SAE's activations by partition.

    >>> head, rows = difference_tables({"l0/exported": 8.5, "l0/crosscoder": 10.0})[0]
    >>> head, rows
    (['on held-out text', 'SAE', 'crosscoder'], [['active latents among those exported (L0)', '8.500', '10.00']])
    """

    def rows(titles: Mapping[str, str], columns: list[str]) -> list[list[str]]:
        return [
            [title, *(cell(difference, f"{key}/{column}") for column in columns)]
            for key, title in titles.items()
            if any(f"{key}/{column}" in difference for column in columns)
        ]

    both = ["exported", "crosscoder"]
    prefix = "firing_recall/"
    partitions = [
        key.removeprefix(prefix)
        for key in difference
        if key.startswith(prefix) and not key.endswith(SE)
    ]
    return [
        (["on held-out text", "SAE", "crosscoder"], rows(OF_BOTH, both)),
        (["the SAE's activations", *partitions], rows(OF_CODE, partitions)),
    ]
