"""Comparing two sets of results: by hand, by scipy, and how often chance is taken for a change."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind, ttest_rel

from benchmarks.tables.compare import (
    Comparison,
    Figure,
    FigureKind,
    compare,
    comparison_table,
    other_lines,
)


def figure(values: Iterable[float], name: str = "recovery: recall", **changes: Any) -> Figure:
    by_seed = {f"seed {i}": value for i, value in enumerate(values)}
    return replace(Figure(name, "higher", 0.01, by_seed), **changes)


def only(old: Figure, new: Figure) -> Comparison:
    (comparison,) = compare([old], [new])
    return comparison


def test_paired_seeds_are_compared_with_themselves() -> None:
    # Differences -0.03, -0.05, -0.04: mean -0.04, standard error 0.01 / sqrt(3), t(2) at 97.5 %
    # 4.303.
    comparison = only(figure([0.8, 0.9, 0.7]), figure([0.77, 0.85, 0.66]))
    assert comparison.difference == pytest.approx(-0.04)
    assert comparison.noise == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    by_scipy: Any = ttest_rel([0.77, 0.85, 0.66], [0.8, 0.9, 0.7])
    assert comparison.q == pytest.approx(by_scipy.pvalue)
    assert comparison.flag == "worse"
    # The same values without their seeds lie well within one another.
    unpaired = only(
        figure([0.8, 0.9, 0.7], is_paired=False), figure([0.77, 0.85, 0.66], is_paired=False)
    )
    assert unpaired.flag == "within noise"


def test_rounds_are_compared_by_welchs_interval() -> None:
    old, new = [1.50, 1.45, 1.55, 1.48], [1.80, 1.95, 1.70]
    comparison = only(
        figure(old, better="lower", is_paired=False), figure(new, better="lower", is_paired=False)
    )
    by_scipy: Any = ttest_ind(new, old, equal_var=False)
    low, high = by_scipy.confidence_interval()
    assert comparison.q == pytest.approx(by_scipy.pvalue)
    assert comparison.difference == pytest.approx((low + high) / 2)
    assert comparison.noise == pytest.approx((high - low) / 2)
    assert comparison.flag == "worse"


def test_a_regression_of_three_standard_deviations_is_flagged_among_twenty_figures() -> None:
    rng = np.random.default_rng(0)
    names = [f"recovery: {i}" for i in range(20)]
    old = [figure(rng.normal(0.8, 0.03, 5), name, is_paired=False) for name in names]
    new = [figure(rng.normal(0.8, 0.03, 5), name, is_paired=False) for name in names]
    noise = np.array([-1.2, -0.6, 0.0, 0.6, 1.2]) * 0.03
    old[7] = figure(0.8 + noise, names[7], is_paired=False)
    new[7] = figure(0.8 - 3.5 * 0.03 + noise, names[7], is_paired=False)
    flagged = [c for c in compare(old, new) if c.flag != "within noise"]
    assert [(c.figure, c.flag) for c in flagged] == [(names[7], "worse")]


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
def test_of_two_hundred_figures_without_a_change_at_most_one_in_twenty_is_flagged(
    paired: bool,
) -> None:
    rng = np.random.default_rng(1)
    runs_with_a_flag = 0
    for _ in range(20):
        sides = [
            [
                figure(rng.normal(0.5, 0.1, 5), str(i), is_paired=paired, least=1e-6)
                for i in range(200)
            ]
            for _ in range(2)
        ]
        flagged = sum(c.flag != "within noise" for c in compare(*sides))
        assert flagged <= 10
        runs_with_a_flag += flagged > 0
    # Where nothing changed, the discovery rate's limit is on any flag at all: expected in one run
    # of twenty.
    assert runs_with_a_flag <= 4


def test_identical_results_are_not_flagged_whatever_their_spread() -> None:
    for values in ([0.5], [0.5, 0.5, 0.5], [0.1, 0.9, 0.4]):
        for kind in ("value", "once"):
            comparison = only(figure(values, kind=kind), figure(values, kind=kind))
            assert (comparison.flag, comparison.difference) == ("within noise", 0)
    unpaired = figure([0.5, 0.5], is_paired=False)
    assert only(unpaired, unpaired).flag == "within noise"


def test_units_that_all_changed_by_the_same_are_not_taken_to_have_no_noise() -> None:
    # Two seeds lost one latent each: t(1) = 1 / (1 / sqrt(2)).
    lost = only(figure([3, 4], least=1.0), figure([2, 3], least=1.0))
    assert lost.flag == "within noise" and lost.q == pytest.approx(0.392, abs=1e-3)
    # Unpaired, of two constants: spread of 1 in either.
    constants = [figure([x, x, x], least=1.0, is_paired=False) for x in (9.0, 0.0)]
    assert only(*constants).flag == "worse"


def test_what_is_certain_but_too_small_is_not_told() -> None:
    comparison = only(figure([0.8, 0.9, 0.7]), figure([0.7951, 0.895, 0.6949]))
    assert comparison.q is not None and comparison.q < 0.001
    assert comparison.flag == "within noise"
    assert comparison.why == "less than 0.010, the smallest change worth reporting"


@pytest.mark.parametrize(
    ("better", "up", "down"),
    [
        ("higher", "better", "worse"),
        ("lower", "worse", "better"),
        ("neither", "changed", "changed"),
    ],
)
def test_a_figure_knows_its_direction(better: str, up: str, down: str) -> None:
    low, high = figure([1, 1.1, 1.2], better=better), figure([2, 2.1, 2.3], better=better)
    assert only(low, high).flag == up
    assert only(high, low).flag == down


def test_a_yes_or_no_is_told_by_the_runs_that_changed() -> None:
    before = [1.0] * 10 + [0.0] * 4
    after = [0.0] * 7 + [1.0] * 3 + [0.0] * 4
    comparison = only(figure(before, kind="binary"), figure(after, kind="binary"))
    assert comparison.q == pytest.approx(binomtest(0, 7).pvalue) and comparison.flag == "worse"
    one_lost = only(figure(before, kind="binary"), figure([0.0, *before[1:]], kind="binary"))
    assert one_lost.flag == "within noise" and one_lost.q == 1


@pytest.mark.parametrize(
    ("new_range", "flag"), [((1.7, 2.0), "worse"), ((1.5, 2.0), "within noise")]
)
def test_without_rounds_the_ranges_must_not_overlap(
    new_range: tuple[float, float], flag: str
) -> None:
    old = figure([1.5], better="lower", range=(1.4, 1.6), is_paired=False)
    new = figure([1.8], better="lower", range=new_range, is_paired=False)
    comparison = only(old, new)
    assert comparison.flag == flag and comparison.q is None
    assert comparison.why.endswith("(one result does not list its rounds)")
    # One side's rounds give its range.
    rounds = figure([1.72, 1.8, 1.9], better="lower", is_paired=False)
    assert only(old, rounds).flag == "worse"


def test_a_figure_that_is_missing_is_told() -> None:
    old = [figure([1, 2], "step: a"), figure([1, 2], "step: b")]
    new = [figure([1, 2], "step: b"), figure([1, 2], "step: c")]
    found = {c.figure: (c.flag, c.why) for c in compare(old, new)}
    assert found["step: a"] == ("not comparable", "only in OLD")
    assert found["step: c"] == ("not comparable", "only in NEW")
    assert {
        "not comparable: 1 of step, only in OLD (a)",
        "not comparable: 1 of step, only in NEW (c)",
    } <= {*other_lines(compare(old, new))}


def test_a_unit_that_is_missing_is_told() -> None:
    comparison = only(figure([1, 2, 3]), figure([1.1, 2.2]))
    assert comparison.why == "2 of 3 units are in both"
    assert (comparison.old, comparison.new) == (1.5, pytest.approx(1.65))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ({"kind": "raw time"}, {"kind": "raw time"}, "a raw time depends on the machine"),
        (
            {"subject": {"machine": "m", "k": 1}},
            {"subject": {"machine": "n"}},
            "machine differs: m / n",
        ),
    ],
)
def test_what_cannot_be_compared_is_not(old: dict[str, Any], new: dict[str, Any], why: str) -> None:
    comparison = only(figure([1, 1, 2], **old), figure([5, 5, 6], **new))
    assert comparison.flag == "not comparable" and comparison.why.startswith(why)


def test_one_seed_on_either_side_has_no_known_noise() -> None:
    comparison = only(figure([0.9]), figure([0.1]))
    assert comparison.flag == "not comparable" and "its noise is unknown" in comparison.why


def test_the_worst_stands_first_and_what_is_within_the_noise_is_counted() -> None:
    kinds: list[FigureKind] = ["value", "raw time"]
    old = [figure([1, 2, 3], f"step: {kind}", kind=kind) for kind in kinds]
    old += [figure([1, 1.1, 1.2], "step: fell"), figure([1, 1.1, 1.2], "step: rose")]
    new = [*old[:2], figure([0.5, 0.58, 0.7], "step: fell"), figure([5, 5.1, 5.3], "step: rose")]
    comparisons = compare(old, new)
    _, *rows = comparison_table(comparisons)
    # Differences -0.50, -0.52, -0.50: standard error 0.00667, times 4.303.
    assert rows[0][:6] == ["step: fell", "worse", "1.100", "0.593", "-0.507", "0.029"]
    assert [row[1] for row in rows] == ["worse", "better"]
    assert [line.partition(",")[0] for line in other_lines(comparisons)] == [
        "not comparable: 1 of step",
        "within noise: 1 of step",
    ]
