"""Renders the HTML report of a run as one self-contained page: verdicts, measures next to their
nulls, and every latent."""

import hashlib
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from sae_lens_dfc.analysis.latents.cards import LatentCard
from sae_lens_dfc.analysis.report.charts import (
    AUC_RANGE,
    GRID,
    clouds,
    effect_marks,
    histograms,
    kind,
    share_marks,
)
from sae_lens_dfc.analysis.report.findings import Finding, Screening
from sae_lens_dfc.analysis.report.page_data import embedded, page_data, templates
from sae_lens_dfc.analysis.report.summary import headlines, lead, warnings
from sae_lens_dfc.analysis.report.tables import cell, columns_of, groups_of, number
from sae_lens_dfc.core.terminal import visible
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.exclusivity.evidence import MAX_FALSE_DISCOVERIES, MAX_KNOWN, MIN_FIRINGS

PARTITION_TITLES = {
    A_EXCLUSIVE: "A only",
    B_EXCLUSIVE: "B only",
    SHARED: "shared",
}
N_OPEN = 30
"""Number of findings shown expanded."""
SCRIPTS = ["table.js", "latent.js", "page.js"]


@dataclass(frozen=True)
class ReportData:
    """The data shown on the page."""

    name_a: str
    name_b: str
    settings: Mapping[str, Any]
    """Settings of the run, by name."""
    metrics: Mapping[str, float]
    """Measures, as in metrics.json."""
    histogram: Mapping[str, list[int]]
    """Histogram of relative decoder norms from 0 to 1, by partition."""
    cards: list[LatentCard]
    """All latents that fire, the most interesting first; those without contexts appear only in the
    table."""
    screening: Screening | None = None


def render_report(data: ReportData) -> str:
    """Render the page. Text from data sets, model names and settings is escaped."""
    environment = templates(visible, autoescape=True)
    style, script = (
        Markup("\n".join(_source(environment, name) for name in names))
        for names in (["report.css"], SCRIPTS)
    )
    bars, bar_ticks = histograms(data.histogram)
    dots, dot_ticks = clouds(data.cards)
    screening = data.screening or Screening([], [])
    findings, shared = (
        sorted(found, key=lambda finding: finding.rank)
        for found in (screening.findings, screening.shared)
    )
    return environment.get_template("report.html").render(
        data=data,
        lead=lead(data.metrics, data.screening),
        headlines=headlines(data.metrics),
        warnings=warnings(data.metrics),
        titles=PARTITION_TITLES,
        groups=_measures(data.metrics),
        columns=[(prefix, title, kind(prefix)) for prefix, title in columns_of(data.metrics)],
        findings=findings,
        shared=shared,
        n_open=N_OPEN,
        effect_scale=_effect_scale(findings),
        shared_scale=_effect_scale(shared),
        effect_marks=effect_marks,
        histograms=bars,
        bar_ticks=bar_ticks,
        clouds=dots,
        dot_ticks=dot_ticks,
        min_firings=MIN_FIRINGS,
        max_false=MAX_FALSE_DISCOVERIES,
        max_known=MAX_KNOWN,
        grid=GRID,
        auc_range=AUC_RANGE,
        number=number,
        n_with_contexts=sum(bool(card.contexts) for card in data.cards),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        json=Markup(embedded(_carried(data, [*findings, *shared]))),
    )


def _carried(data: ReportData, findings: Sequence[Finding]) -> dict[str, Any]:
    """Data for the script; the findings come first in the table, in order."""
    ranks = {finding.latent: rank for rank, finding in enumerate(findings)}
    cards = sorted(data.cards, key=lambda card: ranks.get(card.latent, math.inf))
    names = {"a": visible(data.name_a), "b": visible(data.name_b)}
    titles = {"names": names, "partitions": PARTITION_TITLES}
    return page_data(cards, findings, data.metrics) | titles


def _source(environment: Environment, name: str) -> str:
    """Read verbatim: the browser checks the hash."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].replace("\r\n", "\n")


def _hash(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _measures(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups of rows with their numbers and marks."""
    columns = columns_of(metrics)
    return [
        {
            "title": group.title,
            "note": group.note,
            "rows": [
                {
                    "title": title,
                    "marks": share_marks(metrics, key),
                    "cells": [cell(metrics, prefix + key) for prefix, _ in columns],
                }
                for key, title in group.rows
            ],
        }
        for group in groups_of(metrics)
    ]


def _effect_scale(findings: Sequence[Finding]) -> float:
    effects = [effect for finding in findings for effect in finding.effects]
    return max((max([0.0, e.high, *e.controls.values()]) for e in effects), default=1.0) or 1.0
