"""Computes positions of marks in the report's plots, in percent of width and height so that plots
scale without distorting text."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae_lens_dfc.analysis.latents.cards import LatentCard
from sae_lens_dfc.analysis.report.findings import EffectView
from sae_lens_dfc.analysis.report.tables import COLUMNS, cell, number
from sae_lens_dfc.stats.jackknife import SE

NOT_SHARES = (
    "latents/",
    "l0",
    "exclusive/",
    "pairs_",
    "kl/",
    "mapped_loss/",
    "max_forbidden_weight",
)
"""Prefixes of measures that are not on a scale from 0 to 1."""
AUC_RANGE = 0.4, 1.0
GRID = 400
"""Grid steps per axis of a scatter plot; dots in the same cell are merged."""


class Mark(NamedTuple):
    """A data point in a plot, with an optional error bar."""

    kind: str
    """Determines the shape: `run`, `baseline-batchtopk`, `null-self` and so on."""
    x: float
    low: float | None
    high: float | None
    label: str
    beyond: int
    """-1 or 1 if the value lies left or right of the scale, in which case the mark is at the
    edge."""


def kind(prefix: str) -> str:
    """Name of a column's shape.

    >>> kind(""), kind("null/self/")
    ('run', 'null-self')
    """
    return prefix.strip("/").replace("/", "-") or "run"


def share_marks(metrics: Mapping[str, float], key: str) -> list[Mark]:
    """Marks of a measure for the run, its baselines and its nulls on a scale from 0 to 1; empty if
    the measure is not a share.

    The error bar is one standard error on each side, or for a median over latents the 5th to 95th
    percentile.

    >>> [mark.x for mark in share_marks({"cosine/a": 0.5, "null/self/cosine/a": 1.0}, "cosine/a")]
    [90.0, 50.0]
    """
    if key.startswith(NOT_SHARES):
        return []
    marks: list[Mark] = []
    for prefix, title in COLUMNS:
        value = metrics.get(prefix + key)
        if value is None:
            continue
        error = metrics.get(prefix + key + SE)
        low, high = (metrics.get(f"{prefix}{key}/{end}") for end in ("p5", "p95"))
        said = f"{title}: {cell(metrics, prefix + key)}"
        if error is not None:
            low, high = value - error, value + error
        elif low is not None and high is not None:
            said += f", 5th to 95th percentile {number(low)} to {number(high)}"
        marks.append(_mark(kind(prefix), value, low, high, said))
    # The run comes last, so that it is drawn on top.
    return marks[::-1]


def _mark(
    kind: str, value: float, low: float | None, high: float | None, label: str, scale: float = 1.0
) -> Mark:
    beyond = (value > 1.1 * scale) - (value < -0.1 * scale)
    left, right = (None if end is None else _percent(end / scale) for end in (low, high))
    return Mark(kind, _percent(value / scale), left, right, label, beyond)


def _percent(share: float) -> float:
    """0 is at 10 % of the width and 1 at 90 %; values beyond are clamped near the edge."""
    return round(min(max(10 + 80 * share, 2), 98), 2)


def effect_marks(effect: EffectView, scale: float) -> list[Mark]:
    """Marks of an effect with its interval, and of its controls' 95th percentiles; `scale` is the
    plot's largest value."""
    controls = [
        _mark("control", p95, None, None, f"{name}, 95th percentile: {number(p95)}", scale)
        for name, p95 in effect.controls.items()
    ]
    said = f"{effect.name}: {number(effect.mean)} [{number(effect.low)}, {number(effect.high)}]"
    return [*controls, _mark("run", effect.mean, effect.low, effect.high, said, scale)]


class Bar(NamedTuple):
    """One bar of a histogram."""

    x: float
    width: float
    height: float
    label: str


class Histogram(NamedTuple):
    """One partition's histogram."""

    partition: str
    total: int
    bars: list[Bar]


class Tick(NamedTuple):
    """A tick on an axis."""

    at: float
    label: str


def histograms(counts: Mapping[str, list[int]]) -> tuple[list[Histogram], list[Tick]]:
    """Histograms by partition on a common scale log(1 + n), so that a single latent is visible, and
    the scale's ticks.

    >>> rows, ticks = histograms({"shared": [0, 9]})
    >>> rows[0].bars[0].height, [tick.label for tick in ticks]
    (95.0, ['1', '9'])
    """
    most = max((n for bins in counts.values() for n in bins), default=0)
    if most == 0:
        return [], []
    height = 95 / math.log(1 + most)
    rows = [
        Histogram(
            partition,
            sum(bins),
            [
                Bar(
                    round(100 * i / len(bins), 3),
                    round(100 / len(bins), 3),
                    round(height * math.log(1 + n), 2),
                    f"{n} between {i / len(bins):.2f} and {(i + 1) / len(bins):.2f}",
                )
                for i, n in enumerate(bins)
                if n > 0
            ],
        )
        for partition, bins in counts.items()
    ]
    at = [10**i for i in range(int(math.log10(most)) + 1)]
    if most < 30:
        at = sorted({1, most})
    return rows, [Tick(round(height * math.log(1 + n), 2), f"{n:,}") for n in at]


class Cloud(NamedTuple):
    """Scatter plot of latents: firing rate against predictability from the other model (AUROC)."""

    model: str
    shared: str
    """Path of the shared latents' dots."""
    candidates: str
    called: str
    n_candidates: int
    n_called: int


def clouds(cards: Sequence[LatentCard]) -> tuple[list[Cloud], list[Tick]]:
    """A scatter plot of each model's candidates, and the ticks of the firing rate; empty without
    evidence."""
    cards = [
        c for c in cards if math.isfinite(c.evidence.get("auc", math.nan)) and c.firing_rate > 0
    ]
    candidates = [c for c in cards if c.evidence.get("is_candidate")]
    if not candidates:
        return [], []
    lowest = math.floor(math.log10(min(c.firing_rate for c in cards)))

    def path(chosen: Sequence[LatentCard]) -> str:
        dots = {(_across(c.firing_rate, lowest), _down(float(c.evidence["auc"]))) for c in chosen}
        return "".join(f"M{x} {y}h0" for x, y in sorted(dots))

    shared = path([c for c in cards if c.evidence.get("is_two_sided")])
    result: list[Cloud] = []
    for model in ("a", "b"):
        own = [c for c in candidates if bool(c.evidence.get("is_a")) == (model == "a")]
        called = [c for c in own if c.evidence.get("is_exclusive")]
        result.append(Cloud(model, shared, path(own), path(called), len(own), len(called)))
    ticks = [Tick(_across(10.0**i, lowest), f"{10.0**i:.6%}") for i in range(lowest, 1)]
    return result, [Tick(at, label.rstrip("0%").rstrip(".") + " %") for at, label in ticks]


def _across(rate: float, lowest: int) -> int:
    return round(GRID * (1 - math.log10(rate) / min(lowest, -1)))


def _down(auc: float) -> int:
    low, high = AUC_RANGE
    return round(GRID * (high - min(max(auc, low), high)) / (high - low))
