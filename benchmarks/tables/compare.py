"""Tests whether one set of benchmark results is worse than another, accounting for the noise of
both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev, variance
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import binomtest, fisher_exact
from scipy.stats import t as student

from sae_lens_dfc.analysis.report.tables import number
from sae_lens_dfc.stats.significance import benjamini_hochberg

MAX_FALSE_DISCOVERIES = 0.05
"""False discovery rate among figures called worse, better or changed."""
CONFIDENCE = 0.95

Better = Literal["higher", "lower", "neither"]
FigureKind = Literal["value", "binary", "once", "raw time"]
Flag = Literal["worse", "better", "changed", "not comparable", "within noise"]
ORDER: tuple[Flag, ...] = ("worse", "changed", "better", "not comparable", "within noise")


@dataclass(frozen=True)
class Figure:
    """One figure in one set of results."""

    name: str
    better: Better
    """Which direction is better; for `neither`, changes are reported but not judged."""
    least: float
    """Smallest change worth reporting, in the figure's unit."""
    values: Mapping[str, float]
    """Values by unit: a seed, a round, a run."""
    kind: FigureKind = "value"
    """`binary`: yes or no. `once`: little or no noise; judged by `least` alone. `raw time`:
    specific to one machine and moment, never compared."""
    is_paired: bool = True
    """Whether units of the same name use the same data in both results."""
    subject: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that must agree in both, as far as both record them."""
    range: tuple[float, float] | None = None
    """Range, if only this is known; `values` then holds the median."""

    @property
    def mean(self) -> float:
        """Mean over units."""
        return fmean(self.values.values())

    @property
    def extent(self) -> tuple[float, float]:
        """Range of the values."""
        return self.range or (min(self.values.values()), max(self.values.values()))


class Comparison(NamedTuple):
    """One figure in two sets of results."""

    figure: str
    old: float | None
    """Mean over units; for a paired figure, over the common units."""
    new: float | None
    difference: float | None
    """New minus old."""
    noise: float | None
    """Half the width of the difference's 95 % interval."""
    q: float | None
    """Smallest false discovery rate at which it is reported (Benjamini & Hochberg over all
    figures); none without a test."""
    flag: Flag
    why: str
    """Reason for the flag, if not the test."""


class _Difference(NamedTuple):
    old: float
    new: float
    noise: float | None
    p: float | None
    """None if only the smallest change worth reporting, or the ranges, decide."""
    is_reported: bool = True
    """Whether it would be reported if its p-value were small."""
    why: str = ""


def compare(old: Sequence[Figure], new: Sequence[Figure]) -> list[Comparison]:
    """Compare every figure of either set, worsened figures first.

    A figure is reported if it differs by at least its `least` and the difference is not explained
    by noise:

    - units with the same data (such as a seed) are compared pairwise, by the t interval of their
      differences;
    - others (rounds of a timing) by Welch's t interval;
    - a yes or no by the exact sign test of the units that changed, or Fisher's exact test if the
      units differ;
    - the p-values of all figures are corrected by Benjamini & Hochberg at 5 %.

    If only a median and a range are known, the ranges must not overlap. If all units differ by the
    same amount, their spread is taken to be `least`, since zero spread over a few units is due to
    chance.

    >>> seeds = [f"seed {i}" for i in range(4)]
    >>> before = Figure("recall", "higher", 0.02, dict(zip(seeds, (0.80, 0.82, 0.78, 0.80))))
    >>> after = Figure("recall", "higher", 0.02, dict(zip(seeds, (0.70, 0.73, 0.67, 0.70))))
    >>> [comparison] = compare([before], [after])
    >>> comparison.flag, round(comparison.difference, 2), round(comparison.noise, 3)
    ('worse', -0.1, 0.013)
    """
    before, after = ({figure.name: figure for figure in figures} for figures in (old, new))
    found = {
        name: _difference(before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
    }
    tested = {
        name: d.p for name, d in found.items() if isinstance(d, _Difference) and d.p is not None
    }
    adjusted = benjamini_hochberg(torch.tensor(list(tested.values()), dtype=torch.double)).tolist()
    q = dict(zip(tested, adjusted, strict=True))
    comparisons = [
        _compared(name, before.get(name), after.get(name), found[name], q.get(name))
        for name in found
    ]
    return sorted(comparisons, key=lambda c: (ORDER.index(c.flag), 1.0 if c.q is None else c.q))


def _difference(old: Figure | None, new: Figure | None) -> _Difference | str:
    """The difference, or the reason why there is none."""
    if old is None or new is None:
        return f"only in {'NEW' if old is None else 'OLD'}"
    if old.kind == "raw time":
        return "a raw time depends on the machine and the moment; compare its ratio"
    for name in old.subject.keys() & new.subject.keys():
        if old.subject[name] != new.subject[name]:
            return f"{name} differs: {_short(old.subject[name])} / {_short(new.subject[name])}"
    if old.kind == "once":
        return _by_least(old, new)
    if old.range or new.range:
        return _by_range(old, new)
    common = [unit for unit in old.values if unit in new.values] if old.is_paired else []
    pairs = [(old.values[unit], new.values[unit]) for unit in common]
    if old.kind == "binary":
        return _paired_binary(pairs) if pairs else _binary(old, new)
    if len(pairs) > 1 or any(a == b for a, b in pairs):
        n_units = len({*old.values, *new.values})
        why = "" if len(pairs) == n_units else f"{len(pairs)} of {n_units} units are in both"
        return _paired(pairs, old.least)._replace(why=why)
    if min(len(old.values), len(new.values)) < 2:
        return "one result has a single value, so its noise is unknown"
    return _welch(list(old.values.values()), list(new.values.values()), old.least)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _by_least(old: Figure, new: Figure) -> _Difference:
    return _Difference(
        old.mean, new.mean, None, None, why="measured once, judged by its size alone"
    )


def _by_range(old: Figure, new: Figure) -> _Difference:
    (low, high), (other_low, other_high) = old.extent, new.extent
    apart = high < other_low or other_high < low
    kept = "the ranges do not overlap" if apart else "the ranges overlap"
    return _Difference(
        old.mean, new.mean, None, None, apart, f"{kept} (one result does not list its rounds)"
    )


def _paired(pairs: Sequence[tuple[float, float]], least: float) -> _Difference:
    old, new = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    differences = [b - a for a, b in pairs]
    if len(set(differences)) == 1 and differences[0] == 0:
        return _Difference(old, new, 0.0, 1.0)
    spread = stdev(differences) or least
    noise, p = _student(new - old, spread / math.sqrt(len(pairs)), len(pairs) - 1)
    return _Difference(old, new, noise, p)


def _welch(old: Sequence[float], new: Sequence[float], least: float) -> _Difference:
    a, b = fmean(old), fmean(new)
    squares = [variance(values) / len(values) for values in (old, new)]
    if sum(squares) == 0:
        if a == b:
            return _Difference(a, b, 0.0, 1.0)
        squares = [least**2 / len(values) for values in (old, new)]
    degrees = sum(squares) ** 2 / sum(
        s**2 / (len(values) - 1) for s, values in zip(squares, (old, new), strict=True)
    )
    noise, p = _student(b - a, math.sqrt(sum(squares)), degrees)
    return _Difference(a, b, noise, p)


def _student(difference: float, error: float, degrees: float) -> tuple[float, float]:
    """Half the width of the interval, and the two-sided p-value."""
    noise = error * float(student.ppf((1 + CONFIDENCE) / 2, degrees))
    return noise, 2 * float(student.sf(abs(difference) / error, degrees))


def _paired_binary(pairs: Sequence[tuple[float, float]]) -> _Difference:
    gained, lost = (sum(pair == change for pair in pairs) for change in ((0, 1), (1, 0)))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    old, new = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    return _Difference(old, new, None, float(p))


def _binary(old: Figure, new: Figure) -> _Difference:
    table = [[sum(f.values.values()), len(f.values) - sum(f.values.values())] for f in (old, new)]
    exact: Any = fisher_exact(table)
    return _Difference(old.mean, new.mean, None, float(exact.pvalue))


def _compared(
    name: str,
    old: Figure | None,
    new: Figure | None,
    found: _Difference | str,
    q: float | None,
) -> Comparison:
    if isinstance(found, str):
        a, b = (None if figure is None else figure.mean for figure in (old, new))
        return Comparison(name, a, b, None, None, None, "not comparable", found)
    assert old is not None
    difference = found.new - found.old
    is_reported = found.is_reported and (q is None or q <= MAX_FALSE_DISCOVERIES)
    why = found.why
    if is_reported and difference != 0 and abs(difference) < old.least:
        is_reported, why = (
            False,
            f"less than {number(old.least)}, the smallest change worth reporting",
        )
    flag = _flag(difference, old.better) if is_reported and difference != 0 else "within noise"
    return Comparison(name, found.old, found.new, difference, found.noise, q, flag, why)


def _flag(difference: float, better: Better) -> Flag:
    if better == "neither":
        return "changed"
    return "better" if (difference > 0) == (better == "higher") else "worse"


REPORTED: tuple[Flag, ...] = ("worse", "changed", "better")
HEAD = ["figure", "", "old", "new", "difference", "noise", "q", ""]


def comparison_table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Head and rows of the reported figures.

    >>> one = Comparison("step: ratio", 1.0, 2.0, 1.0, 0.1, 0.01, "worse", "")
    >>> comparison_table([one])[1]
    ['step: ratio', 'worse', '1.000', '2.000', '+1.000', '0.100', '0.01', '']
    """
    return [HEAD] + [
        [
            c.figure,
            c.flag,
            *(number(c.old), number(c.new), _signed(c.difference), number(c.noise)),
            "" if c.q is None else f"{c.q:.2g}",
            c.why,
        ]
        for c in comparisons
        if c.flag in REPORTED
    ]


def other_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Counts of figures not reported by benchmark and reason, with names if not comparable.

    >>> other_lines([Comparison("step: step_ms", 1.0, 2.0, None, None, None, "not comparable", "a raw time")])
    ['not comparable: 1 of step, a raw time (step_ms)']
    """
    groups: dict[tuple[Flag, str, str], list[str]] = {}
    for c in comparisons:
        if c.flag not in REPORTED:
            benchmark, _, figure = c.figure.partition(": ")
            groups.setdefault((c.flag, benchmark, c.why), []).append(figure)
    lines: list[str] = []
    for (flag, benchmark, why), figures in groups.items():
        line = f"{flag}: {len(figures)} of {benchmark}" + (f", {why}" if why else "")
        if flag == "not comparable":
            line += f" ({'; '.join(figures[:3])}{'; ...' if len(figures) > 3 else ''})"
        lines.append(line)
    return lines


def _signed(value: float | None) -> str:
    return "" if value is None else ("+" if value > 0 else "") + number(value)
