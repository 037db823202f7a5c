"""Writes the summary at the top of the report: what was found, headline numbers with their nulls,
and warnings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae_lens_dfc.analysis.causal.mapped_loss import who_knows_more
from sae_lens_dfc.analysis.report.findings import Finding, Screening
from sae_lens_dfc.analysis.report.tables import COLUMNS, cell, number
from sae_lens_dfc.crosscoders.groups import EXCLUSIVE_TO
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS


class Headline(NamedTuple):
    """A headline number, and the value to compare it with."""

    title: str
    value: str
    note: str


def lead(metrics: Mapping[str, float], screening: Screening | None) -> str:
    """Summarize what was found in a sentence or two, limited to what was measured.

    >>> lead({}, None)
    'Whether a latent is exclusive was not measured, so nothing on this page distinguishes a difference from an artifact. sae-lens-dfc evaluate RUN --output FOLDER measures it.'
    """
    return " ".join(filter(None, [_found(metrics, screening), who_knows_more(metrics)]))


def _found(metrics: Mapping[str, float], screening: Screening | None) -> str:
    if screening is not None:
        shared = _shared(screening.shared)
        verdicts = Counter(finding.verdict for finding in screening.findings)
        if not verdicts:
            return f"No latent reached the end of the screening.{shared}"
        counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
        of_all = f"Of {screening.stages[0].intake:,} latents, " if screening.stages else ""
        return f"{of_all}{verdicts.total():,} reached the end of the screening: {counts}.{shared}"
    called, judged = _calls(metrics, "")
    if judged is None:
        return (
            "Whether a latent is exclusive was not measured, so nothing on this page distinguishes a difference from an artifact. "
            "sae-lens-dfc evaluate RUN --output FOLDER measures it."
        )
    found = f"{called:,} of {judged:,} judged candidates are" if called else "No latent is"
    of_none = "" if called else f" ({judged:,} candidates could be judged{_power(metrics)})"
    return (
        f"{found} exclusive with evidence from activations{of_none}. "
        "No latent was screened, so none was tested causally."
    )


def _shared(found: Sequence[Finding]) -> str:
    verdicts = Counter(finding.verdict for finding in found)
    if not verdicts:
        return ""
    named = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    return f" Of {verdicts.total():,} shared latents that were ablated in both models: {named}."


def headlines(metrics: Mapping[str, float]) -> list[Headline]:
    """The headline numbers, each with its null."""
    result: list[Headline] = []
    for model, group in EXCLUSIVE_TO.items():
        called = metrics.get(f"exclusive/significant/{group}")
        if called is None:
            continue
        judged = metrics.get(f"exclusive/judged/{group}", 0)
        result.append(
            Headline(
                f"Exclusive to {model.upper()}, with evidence",
                f"{called:,.0f} of {judged:,.0f}",
                f"judged candidates. {_null_calls(metrics)}",
            )
        )
    for model in "ab":
        key = f"explained_variance/{model}"
        if key not in metrics:
            continue
        beside = [
            f"{name} {number(metrics[prefix + key])}"
            for prefix, name in COLUMNS[1:]
            if prefix + key in metrics
        ]
        note = "; ".join(beside) or "nothing was measured for comparison"
        title = f"Explained variance, {model.upper()}"
        result.append(Headline(title, cell(metrics, key), note))
    return result


def _calls(metrics: Mapping[str, float], prefix: str) -> tuple[int, int | None]:
    """Number of significant and of judged latents in both models; None if not measured."""
    keys = [
        [f"{prefix}exclusive/{what}/{group}" for group in EXCLUSIVE_TO.values()]
        for what in ("significant", "judged")
    ]
    called, judged = (
        sum(metrics[key] for key in both) if all(key in metrics for key in both) else None
        for both in keys
    )
    return int(called or 0), None if judged is None else int(judged)


def _power(metrics: Mapping[str, float]) -> str:
    """What would have been found, for a run in which nothing was."""
    found = {
        f"{m.upper()}'s": metrics[key]
        for m in "ab"
        if (key := f"exclusive/power/{m}_exclusive") in metrics
    }
    chances = " and ".join(f"{value:.0%} for {whose}" for whose, value in found.items())
    return chances and f"; a clear difference would have been found with a probability of {chances}"


def _null_calls(metrics: Mapping[str, float]) -> str:
    for name in ("self", "seed"):
        called, judged = _calls(metrics, f"null/{name}/")
        if judged is not None:
            return f"Null, {NULLS[name]}, both sides: {called:,} of {judged:,}."
    return "Its null was not measured."


def warnings(metrics: Mapping[str, float]) -> list[str]:
    """Reasons why numbers on the page should not be taken at face value."""
    result: list[str] = []
    if not any(key.startswith("null/") for key in metrics):
        result.append(
            "This page has no null: the pipeline was not run on a pair without differences for comparison."
        )
    if metrics.get("l0") == 0:
        result.append(
            "No latent fires on the held-out text: the crosscoder reconstructs only its bias."
        )
    called, judged = _calls(metrics, "")
    null_called, null_judged = _calls(metrics, "null/self/")
    if called and judged and null_judged and null_called / null_judged >= called / judged:
        result.append(
            f"On model A twice, where nothing is exclusive, {null_called} of {null_judged} judged candidates are significant: a share "
            "at least as large as in this run. Do not trust the verdicts on this page."
        )
    if metrics.get("max_forbidden_weight", 0) != 0:
        result.append(
            "The largest forbidden weight is not 0: an exclusive latent has a weight in the model it must not touch."
        )
    return result
