"""Measures which model knows more, without a crosscoder: the rise of each model's next-token loss
when it continues from an affine map of the other's activations."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.downstream import MEAN, check_whole, spliced_sums
from sae_lens_dfc.analysis.steering.splicing import UNTOUCHED, Edit
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.target_worse import MIN_LOSS_RATIO
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.jackknife import SE, Jackknife, Sums, added

MAPPED = "/mapped"
PREFIX = "mapped_loss/"
MIN_RISE = 1e-3
"""Rise in nats per token below which no model is named: the models may run in bfloat16, and one
model's two maps to itself differ by rounding."""
N_ERRORS = 2
"""Standard errors by which a rise must exceed 0, and the other model's, and by which the ratio of the
losses must exceed 1.25, to name a model."""


@torch.no_grad()
def mapped_loss(
    pair: ModelPair,
    batches: Iterable[PairedRows],
    affine_maps: AffineMaps,
) -> dict[str, float]:
    """Rise of each model's next-token loss when its activations at the paired positions are
    replaced by the affine map of the other model's.

    What the other model does not represent linearly at its hook is missing from its map, and the
    model's own upper layers say what that costs. This is model stitching at one layer with an
    affine map (Lenc & Vedaldi 2015, arXiv 1411.5908; Bansal et al. 2021, arXiv 2106.07682), with
    the map fitted by ridge regression to the activations, not trained on the loss. A poor map
    raises both models' losses, so the two rises are to be compared with each other, and each with
    that of its mean, which keeps nothing.

    All other positions keep their activations: unpaired ones, outliers and the first. Losses are
    means over the positions whose next token is known and that come at or after the first replaced
    position of their context. Standard errors are a jackknife's over blocks of batches.

    Args:
        pair: The two models, whole: not with `drop_unused_layers`.
        batches: Rows `(n, d_a + d_b)` of raw held-out activations with their contexts, from
            `PairData.held_out_with_text`.
        affine_maps: Affine maps between the models, fitted on other pairs.

    Returns:
        For `m` in `a`, `b`, in nats per token: `mapped_loss/untouched/m`, the model's loss;
        `mapped_loss/rise/m`, its rise given the map of the other's activations;
        `mapped_loss/rise_of_mean/m`, its rise given its mean activation, for comparison; and
        `mapped_loss/b_minus_a`, the difference of the two rises. Without unit,
        `mapped_loss/b_over_a`: the untouched B's loss on all this text over A's, which is
        comparable whatever the tokenizers. The same of each group of text under
        `mapped_loss/GROUP/`, if there are several. Each with its `/se` if there are at least two blocks.

    Raises:
        ValueError: There are no rows, they come without contexts, or a model was loaded without its
            upper layers.
    """
    check_whole(pair)
    whole, groups = Jackknife(_measures), dict[str, Jackknife]()
    for rows in tqdm(batches, "Loss with the other's map", leave=False):
        total: dict[str, Tensor] = {}
        for name, of_group in _by_group(rows).items():
            sums: dict[str, Tensor] = {}
            for part in spliced_sums(pair, of_group, _edits(of_group, affine_maps)):
                sums = added(sums, part)
            total = added(total, sums)
            groups.setdefault(f"{name}/", Jackknife(_measures)).update(sums)
        if total:
            whole.update(total)
    return {
        f"{PREFIX}{group}{name}": value
        for group, metric in {"": whole, **(groups if len(groups) > 1 else {})}.items()
        for name, value in metric.compute().items()
    }


def _by_group(rows: PairedRows) -> dict[str, PairedRows]:
    """The rows of each group of text that has any."""
    names = dict.fromkeys(context.group for context in rows.contexts)
    if len(names) < 2:
        return {name: rows for name in names or ("",) if len(rows.acts) > 0}
    parts = {
        name: rows_in(rows, [c for c in rows.contexts if c.group == name])[0] for name in names
    }
    return {name: part for name, part in parts.items() if len(part.acts) > 0}


def _edits(rows: PairedRows, affine_maps: AffineMaps) -> dict[str, dict[str, Edit]]:
    mean_a, mean_b = affine_maps.mean_a, affine_maps.mean_b
    acts_a, acts_b = rows.acts.to(mean_a.device).split([len(mean_a), len(mean_b)], dim=-1)
    return {
        "a": {MAPPED: Edit(affine_maps.to_a(acts_b)), MEAN: Edit(mean_a.expand_as(acts_a))},
        "b": {MAPPED: Edit(affine_maps.to_b(acts_a)), MEAN: Edit(mean_b.expand_as(acts_b))},
    }


def _measures(sums: Sums) -> dict[str, float]:
    result: dict[str, float] = {}
    for m in ("a", "b"):
        untouched, mapped, mean = (
            (sums[f"{m}{name}"][0] / sums[f"{m} predicted"]).item()
            for name in (UNTOUCHED, MAPPED, MEAN)
        )
        result[f"untouched/{m}"] = untouched
        result[f"rise/{m}"] = mapped - untouched
        result[f"rise_of_mean/{m}"] = mean - untouched
    result["b_minus_a"] = result["rise/b"] - result["rise/a"]
    result["b_over_a"] = (sums[f"b{UNTOUCHED}"][0] / sums[f"a{UNTOUCHED}"][0]).item()
    return result


class Measure(NamedTuple):
    """A measure of both models' losses."""

    value: float
    se: float
    """Its standard error; NaN if unknown."""


class Losses(NamedTuple):
    """What tells which of two models knows more."""

    rise_a: Measure
    """Rise of A's loss given B's mapped activations, in nats per token."""
    rise_b: Measure
    b_minus_a: Measure
    """Their difference, with its own standard error: both come from the same text."""
    b_over_a: Measure
    """B's untouched loss on all the text over A's."""


def knows_more(losses: Losses) -> Literal["a", "b"] | None:
    """The model that knows what the other does not; none if the losses do not tell.

    It is the one with the larger rise, if

    - this rise exceeds 0, and the other's, by more than two standard errors, and both by more than
      0.001 nats per token, and
    - the other model's untouched loss on the text is more than 1.25 times its own, by more than two
      standard errors. Of two models that know the text equally well, the wider one loses more by
      the other's map.

    An unknown standard error names none.

    >>> def of(a: float, b: float, b_over_a: float) -> Losses:
    ...     return Losses(*(Measure(x, 0.03) for x in (a, b, b - a, b_over_a)))
    >>> knows_more(of(0.06, 0.98, b_over_a=0.7))
    'b'
    >>> knows_more(of(1.27, -0.17, b_over_a=1.5))
    'a'
    >>> knows_more(of(0.06, 0.98, b_over_a=1.0))  # both predict the text as well
    >>> knows_more(of(0.50, 0.55, b_over_a=0.7))  # both lose as much
    >>> knows_more(of(-0.17, 0.01, b_over_a=0.7))  # neither loses
    """
    name, larger = ("b", losses.rise_b) if losses.b_minus_a.value > 0 else ("a", losses.rise_a)
    difference = Measure(abs(losses.b_minus_a.value), losses.b_minus_a.se)
    rises = all(x > MIN_RISE and x > N_ERRORS * se for x, se in (larger, difference))
    ratio, se = losses.b_over_a if name == "a" else _inverse(losses.b_over_a)
    return name if rises and ratio - MIN_LOSS_RATIO > N_ERRORS * se else None


def _inverse(ratio: Measure) -> Measure:
    if ratio.value <= 0:
        return Measure(math.nan, math.nan)
    return Measure(1 / ratio.value, ratio.se / ratio.value / ratio.value)


def named_groups(metrics: Mapping[str, float]) -> list[str]:
    """Names of the groups of text that have measures of their own.

    >>> named_groups({"mapped_loss/b_minus_a": 1.0, "mapped_loss/pt/b_minus_a": 1.0})
    ['pt']
    """
    found = (re.fullmatch(rf"{PREFIX}([\w.-]+)/b_minus_a", name) for name in metrics)
    return [match[1] for match in found if match is not None]


def who_knows_more(metrics: Mapping[str, float]) -> str:
    """Say in a sentence which model knows what the other does not, and by group of text in another;
    empty if it was not measured.

    >>> measures = {"rise/a": 0.06, "rise/b": 0.98, "b_minus_a": 0.92, "b_over_a": 0.7}
    >>> measured = {f"mapped_loss/{name}": x for name, x in measures.items()}
    >>> who_knows_more(measured | {f"{name}/se": 0.03 for name in measured}).split("; ")[1]
    "given B's, A's rises by 0.060 ± 0.030, and on the same text B's untouched loss is 0.70 ± 0.03 times A's: B knows what A does not."
    """
    losses = _losses(metrics, "")
    if losses is None:
        return ""
    ratio, error = losses.b_over_a
    named = {None: "neither is shown to know more", **{m: _knows(m) for m in "ab"}}
    result = (
        f"Given A's activations mapped into it, B's loss {_said(losses.rise_b)} nats per token; "
        f"given B's, A's {_said(losses.rise_a)}, and on the same text B's untouched loss is "
        f"{ratio:.2f}{_plus_minus(error, 2)} times A's: {named[knows_more(losses)]}."
    )
    by_group: dict[str, list[str]] = {}
    for group, knows in knows_more_by_group(metrics).items():
        by_group.setdefault(named[knows], []).append(group)
    if by_group:
        told = [f"on {', '.join(names)}, {what}" for what, names in by_group.items()]
        result += f" By group of text: {'; '.join(told)}."
    return result


def knows_more_by_group(metrics: Mapping[str, float]) -> dict[str, Literal["a", "b"] | None]:
    """`knows_more` on each group of text that has measures of its own."""
    found = {name: _losses(metrics, f"{name}/") for name in named_groups(metrics)}
    return {name: knows_more(losses) for name, losses in found.items() if losses is not None}


def _knows(m: str) -> str:
    other = "b" if m == "a" else "a"
    return f"{m.upper()} knows what {other.upper()} does not"


def _said(rise: Measure) -> str:
    verb = "falls" if rise.value < 0 else "rises"
    return f"{verb} by {abs(rise.value):.3f}{_plus_minus(rise.se, 3)}"


def _plus_minus(se: float, digits: int) -> str:
    return "" if math.isnan(se) else f" ± {se:.{digits}f}"


def _losses(metrics: Mapping[str, float], group: str) -> Losses | None:
    names = ("rise/a", "rise/b", "b_minus_a", "b_over_a")
    keys = [f"{PREFIX}{group}{name}" for name in names]
    if not all(key in metrics for key in keys):
        return None
    return Losses(*(Measure(metrics[key], metrics.get(key + SE, math.nan)) for key in keys))
