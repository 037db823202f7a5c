"""Serializes latents for the report page as compact JSON that is safe to embed in HTML."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_dfc.analysis.latents.cards import ContextView, LatentCard
from sae_lens_dfc.analysis.report.findings import Finding
from sae_lens_dfc.core.terminal import visible
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MAX_FALSE_DISCOVERIES,
    MAX_KNOWN,
    METRICS,
    MIN_FIRINGS,
)
from sae_lens_dfc.metrics.exclusivity.target_worse import MIN_LOSS_RATIO

EVIDENCE = {
    "is_candidate": (
        "Candidate",
        "In an exclusive partition, or with almost all of its decoder norm in one model. A candidate is a starting point, not a finding.",
    ),
    "firings": (
        "Held-out firings",
        f"Pairs of held-out text on which it fires, as a function of {{source}} alone. Latents with fewer than {MIN_FIRINGS} are not judged.",
    ),
    "known": (
        "Share known to {target}",
        "How much of its activation a small neural network predicts from {target}'s activations, relative to {source}'s own, within texts. 1: {target} knows all of it. 0: nothing.",
    ),
    "target_worse": (
        "Firings after which {target} predicts worse",
        f"Share of its firings after which {{target}}'s loss on the text that follows, up to the eighth pair, is more than {MIN_LOSS_RATIO} times {{source}}'s. Above 0.5: {{target}} lacks what it is followed by.",
    ),
    "own_r2": (
        "Activation predicted from {source} (R²)",
        "Share of its variance within texts that {source}'s own activations explain: the ceiling. A latent with little is not judged.",
    ),
    "nu_error": (
        "Latent scaling, error",
        "Latent scaling on the reconstruction error: how much of its direction, mapped to {target}, is in the error there, relative to {source}. Near 0: {target} does not have the direction.",
    ),
    "nu_reconstruction": (
        "Latent scaling, reconstruction",
        "Latent scaling on the reconstruction: how much of its direction other latents reconstruct in {target}, relative to {source}. Near 0: no other latent replaces it there.",
    ),
    "auc": (
        "Firing predicted from {target} (AUROC)",
        "How well an affine map from {target} predicts when it fires. 1: perfectly, so {target} has the information. 0.5: at chance.",
    ),
    "r2": (
        "Activation predicted from {target} (r²)",
        "Squared correlation of its activation with the prediction from {target}. Near 0: the activation cannot be predicted from {target}.",
    ),
    "span": (
        "Direction explained by {target}'s shared latents",
        "Share of its direction, mapped to {target}, that five shared latents explain. High: {target} may have it split over several latents.",
    ),
    "p": (
        "p",
        "Larger of two probabilities: of a share known this small if {target} knew half of it, and of firings like these if {target} predicted worse after half of them.",
    ),
    "q": (
        "q",
        f"Smallest false discovery rate at which it is significant (exclusive). The threshold is {MAX_FALSE_DISCOVERIES}.",
    ),
    "is_exclusive": (
        "Exclusive, with evidence",
        f"{{target}} knows less than {MAX_KNOWN:.0%} of it, and predicts worse after most of its firings, at a false discovery rate of {MAX_FALSE_DISCOVERIES:.0%}. This is evidence from activations, to be confirmed by a causal test.",
    ),
}
"""Label and explanation of each measure of a latent's evidence."""
_GROUPS = [
    ("", "shared", "latents both models have"),
    ("null/self/", "a_exclusive", "null, model A twice: exclusive latents"),
    ("null/seed/", "a_exclusive", "null, two initializations: exclusive latents"),
    ("null/shuffle/", "shared", "null, pairs shuffled: shared latents"),
]


def templates(shown: Callable[[str], str], **options: Any) -> Environment:
    """The templates of the report and the model card, in which `shown` escapes every value that is
    not marked as escaped."""
    return Environment(
        loader=PackageLoader("sae_lens_dfc.analysis.report"),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else shown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def embedded(value: Any) -> str:
    """JSON that is safe inside a `<script>` element: no `<`, `>` or `&`, and no lone surrogates.

    >>> embedded({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def page_data(
    cards: Sequence[LatentCard], findings: Sequence[Finding], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Data for the page's script: the numbers of all latents by column, and cards of those with
    contexts.

    Args:
        cards: All latents of the table, in its initial order.
        findings: Findings of a screening.
        metrics: Metrics with the reference values shown next to a latent's evidence.
    """
    verdicts = list(dict.fromkeys(card.verdict for card in cards))
    numbers = {text: i for i, text in enumerate(verdicts)}
    measured = {name for card in cards for name in card.evidence}
    names = [*EVIDENCE, "is_a", *sorted(measured - {*EVIDENCE, "is_a"})]
    columns: dict[str, list[Any]] = {
        "latent": [card.latent for card in cards],
        "partition": [card.partition for card in cards],
        "verdict": [numbers[card.verdict] for card in cards],
        "rate": [_short(card.firing_rate) for card in cards],
        "mean": [_short(card.mean_activation) for card in cards],
        "max": [_short(card.max_activation) for card in cards],
        "norm": [_short(card.relative_decoder_norm) for card in cards],
    }
    evidence = {
        name: [_short(card.evidence.get(name)) for card in cards]
        for name in names
        if name in measured
    }
    return {
        "columns": columns,
        "evidence": evidence,
        "verdicts": [visible(text) for text in verdicts],
        "words": EVIDENCE,
        "references": references(metrics),
        "cards": {card.latent: _card(card) for card in cards if card.contexts},
        "findings": {f.latent: _finding(f) for f in findings},
    }


def references(metrics: Mapping[str, float]) -> dict[str, list[tuple[str, float, float, float]]]:
    """Reference values by measure: title, median, 5th and 95th percentile, if measured.

    >>> key = "null/self/transfer/auc/a_exclusive"
    >>> references({key: 1.0, key + "/p5": 0.99, key + "/p95": 1.0})
    {'auc': [('null, model A twice: exclusive latents', 1.0, 0.99, 1.0)]}
    """
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for name, metric in METRICS.items():
        for prefix, group, title in _GROUPS:
            keys = [f"{prefix}{metric}/{group}{end}" for end in ("", "/p5", "/p95")]
            if all(key in metrics for key in keys):
                middle, low, high = (metrics[key] for key in keys)
                found.setdefault(name, []).append((title, middle, low, high))
    return found


def _short(value: float | bool | None) -> float | bool | None:
    """Round to the four digits shown; NaN becomes null in JSON."""
    if value is None or isinstance(value, bool | int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _card(card: LatentCard) -> dict[str, Any]:
    return {
        "contexts": [_context(context) for context in card.contexts],
        "cosine": {model: _short(value) for model, value in card.encoder_decoder_cosine.items()},
        "logits": {
            model: [
                [(visible(token), _short(value)) for token, value in tokens]
                for tokens in (effect.promoted, effect.suppressed)
            ]
            for model, effect in card.logit_effects.items()
        },
    }


def _context(context: ContextView) -> list[Any]:
    """Segments, (segment, activation) pairs of nonzero activations, then the context's position.

    Most segments are one token that is the same in both models, and are written once.
    """
    tokens = [
        ([visible(token) for token in s.tokens_a], [visible(token) for token in s.tokens_b])
        for s in context.segments
    ]
    acts: list[Any] = []
    for i, segment in enumerate(context.segments):
        if segment.activation > 0:
            acts += [i, _short(segment.activation)]
    return [
        [a[0] if a == b and len(a) == 1 else [a, b] for a, b in tokens],
        acts,
        context.document,
        context.position_a,
        context.position_b,
        _short(context.activation),
        context.quantile,
    ]


def _finding(finding: Finding) -> dict[str, Any]:
    """The fields that the script shows and searches; the rest is static HTML."""
    description = finding.description
    return {
        "description": None if description is None else visible(description),
        "verdict": visible(finding.verdict),
        "said": [visible(text) for text in (*finding.concerns, *finding.reasons)],
        "samples": [
            {
                name: visible(value, keep_lines=True) if isinstance(value, str) else value
                for name, value in asdict(sample).items()
            }
            for sample in finding.samples
        ],
    }
