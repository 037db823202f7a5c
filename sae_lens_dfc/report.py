"""One self-contained HTML page about a run, for an auditor: verdicts, measures beside their nulls, and every latent."""

import hashlib
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_dfc.charts import AUC_RANGE, GRID, clouds, effect_marks, histograms, kind, share_marks
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.findings import Finding, Screening
from sae_lens_dfc.latents import LatentCard
from sae_lens_dfc.measures import COLUMNS, GROUPS, cell, number
from sae_lens_dfc.nulls import NULLS
from sae_lens_dfc.page_data import embedded, page_data, visible

PARTITION_TITLES = {
    A_EXCLUSIVE: "A only",
    B_EXCLUSIVE: "B only",
    SHARED: "shared",
}
N_OPEN = 30
"""Findings that are read without opening anything."""
SCRIPTS = ["table.js", "latent.js", "page.js"]


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
    """All latents that fire, the most interesting first; those without contexts are in the table alone."""
    screening: Screening | None = None


class Headline(NamedTuple):
    """A number to read first, and what to hold beside it."""

    title: str
    value: str
    note: str


def lead(data: ReportData) -> str:
    """What was found, in a sentence or two; no more than was measured.

    >>> lead(ReportData("x", "y", {}, {}, {}, []))
    'Whether a latent is exclusive was not measured, so nothing on this page tells a difference from an artefact. sae-lens-dfc evaluate RUN --output FOLDER measures it.'
    """
    if data.screening is not None:
        verdicts = Counter(finding.verdict for finding in data.screening.findings)
        if not verdicts:
            return "No latent came to the end of the screening."
        counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
        intake = data.screening.stages[0].intake if data.screening.stages else len(data.cards)
        return f"Of {intake:,} latents, {verdicts.total():,} came to the end of the screening: {counts}."
    called, judged = _calls(data.metrics, "")
    if judged is None:
        return (
            "Whether a latent is exclusive was not measured, so nothing on this page tells a difference from an artefact. "
            "sae-lens-dfc evaluate RUN --output FOLDER measures it."
        )
    found = f"{called:,} of {judged:,} judged candidates are" if called else "No latent is"
    of_none = "" if called else f" ({judged:,} candidates could be judged)"
    return (
        f"{found} called exclusive on the evidence of activations{of_none}. "
        "No latent was screened, so none is confirmed by steering."
    )


def headlines(data: ReportData) -> list[Headline]:
    """The numbers at the top, each with its null."""
    metrics = data.metrics
    result: list[Headline] = []
    for model, group in (("A", A_EXCLUSIVE), ("B", B_EXCLUSIVE)):
        called = metrics.get(f"exclusive/called/{group}")
        if called is None:
            continue
        judged = metrics.get(f"exclusive/judged/{group}", 0)
        result.append(
            Headline(
                f"Called exclusive to {model}",
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
        note = "; ".join(beside) or "nothing was measured beside it"
        title = f"Explained variance, {model.upper()}"
        result.append(Headline(title, cell(metrics, key), note))
    return result


def _calls(metrics: Mapping[str, float], prefix: str) -> tuple[int, int | None]:
    """How many are called and judged, of both models; None where it was not measured."""
    called, judged = (
        [metrics[f"{prefix}exclusive/{what}/{g}"] for g in (A_EXCLUSIVE, B_EXCLUSIVE)]
        if f"{prefix}exclusive/{what}/{A_EXCLUSIVE}" in metrics
        else None
        for what in ("called", "judged")
    )
    return int(sum(called or [])), None if judged is None else int(sum(judged))


def _null_calls(metrics: Mapping[str, float]) -> str:
    for name in ("self", "seed"):
        called, judged = _calls(metrics, f"null/{name}/")
        if judged is not None:
            return f"Null, {NULLS[name]}, both sides: {called:,} of {judged:,}."
    return "Its null was not measured."


def warnings(data: ReportData) -> list[str]:
    """Why numbers on the page should not be believed as they are."""
    metrics = data.metrics
    result: list[str] = []
    if not any(key.startswith("null/") for key in metrics):
        result.append("This page has no null: no pair with nothing to find was measured beside it.")
    called, judged = _calls(metrics, "")
    null_called, null_judged = _calls(metrics, "null/self/")
    if called and judged and null_judged and null_called / null_judged >= called / judged:
        result.append(
            f"On model A twice, where nothing is exclusive, {null_called} of {null_judged} are called: no smaller a share than "
            "in this run. The calls here tell nothing."
        )
    if metrics.get("leak", 0) != 0:
        result.append(
            "The leak is not 0: an exclusive latent has a weight in the model it must not touch."
        )
    return result


def render_report(data: ReportData) -> str:
    """The page. Everything that comes from a data set, a model's name or a setting is shown as text."""
    environment = Environment(
        loader=PackageLoader("sae_lens_dfc"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        Markup("\n".join(_source(environment, name) for name in names))
        for names in (["report.css"], SCRIPTS)
    )
    bars, bar_ticks = histograms(data.histogram)
    dots, dot_ticks = clouds(data.cards)
    return environment.get_template("report.html").render(
        data=data,
        lead=lead(data),
        headlines=headlines(data),
        warnings=warnings(data),
        titles=PARTITION_TITLES,
        groups=_measures(data.metrics),
        columns=_columns(data.metrics),
        findings=_findings(data),
        n_open=N_OPEN,
        effect_scale=_effect_scale(_findings(data)),
        effect_marks=effect_marks,
        histograms=bars,
        bar_ticks=bar_ticks,
        clouds=dots,
        dot_ticks=dot_ticks,
        grid=GRID,
        auc_range=AUC_RANGE,
        number=number,
        n_with_contexts=sum(bool(card.contexts) for card in data.cards),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        json=Markup(embedded(_carried(data))),
    )


def _findings(data: ReportData) -> list[Finding]:
    return [] if data.screening is None else sorted(data.screening.findings, key=lambda f: f.rank)


def _carried(data: ReportData) -> dict[str, Any]:
    """For the script: findings come first in the table, in their order."""
    findings = _findings(data)
    ranks = {finding.latent: finding.rank for finding in findings}
    cards = sorted(data.cards, key=lambda card: ranks.get(card.latent, math.inf))
    names = {"a": visible(data.name_a), "b": visible(data.name_b)}
    titles = {"names": names, "partitions": PARTITION_TITLES}
    return page_data(cards, findings, data.metrics) | titles


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(str(value))


def _source(environment: Environment, name: str) -> str:
    """As it stands: the browser compares it with its hash."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")


def _hash(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _columns(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Prefix, title and shape of those that hold anything."""
    keys = [key for group in GROUPS for key, _ in group.rows]
    return [
        (prefix, title, kind(prefix))
        for prefix, title in COLUMNS
        if any(prefix + key in metrics for key in keys)
    ]


def _measures(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups of rows with their numbers and marks, without what holds nothing."""
    columns = _columns(metrics)
    groups = [
        {
            "title": group.title,
            "note": group.note,
            "rows": [
                {
                    "title": title,
                    "marks": share_marks(metrics, key),
                    "cells": [cell(metrics, prefix + key) for prefix, _, _ in columns],
                }
                for key, title in group.rows
                if any(prefix + key in metrics for prefix, _, _ in columns)
            ],
        }
        for group in GROUPS
    ]
    return [group for group in groups if group["rows"]]


def _effect_scale(findings: Sequence[Finding]) -> float:
    effects = [effect for finding in findings for effect in finding.effects]
    return max((max([e.high, *e.controls.values()]) for e in effects), default=1.0) or 1.0
