"""Collects the data that the HTML report shows about a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sae_lens_dfc.analysis.latents.cards import LatentCard, latent_cards, strongest_latents
from sae_lens_dfc.analysis.latents.max_activating import collect_max_activating
from sae_lens_dfc.analysis.report.page import ReportData
from sae_lens_dfc.analysis.report.results import Measured
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import (
    relative_decoder_norms,
    relative_norm_histogram,
)
from sae_lens_dfc.metrics.exclusivity.evidence import ranking, verdict
from sae_lens_dfc.metrics.firings_by_group import top_group
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

LATENTS_PER_PARTITION = 12
"""Number of latents per partition shown with contexts, chosen by summed activation."""
LATENTS_WITH_EVIDENCE = 60
"""Number of additional latents shown, chosen by evidence of being exclusive."""


def report_data(
    measured: Measured, data: PairData, pair: ModelPair, cfg: CrosscoderRunnerConfig
) -> ReportData:
    """The report's data for a saved crosscoder and its settings."""
    crosscoder, (metrics, firing, evidence), _ = measured
    gathered = collect_max_activating(crosscoder, data.held_out)
    latents = strongest_latents(firing, LATENTS_PER_PARTITION)
    if evidence is not None:
        most = ranking(evidence)[:LATENTS_WITH_EVIDENCE].tolist()
        latents = list(dict.fromkeys([*most, *latents]))
    places = {latent: gathered.places(latent) for latent in latents}
    shown = {place.context for of_latent in places.values() for place in of_latent}
    rows = data.held_out_of(shown)
    cards = latent_cards(crosscoder, gathered, places, rows, pair, evidence)
    return ReportData(
        name_a=pair.a.name,
        name_b=pair.b.name,
        settings=report_settings(cfg),
        metrics=metrics,
        histogram=relative_norm_histogram(crosscoder),
        cards=all_cards(measured, cards),
    )


def all_cards(measured: Measured, cards: Sequence[LatentCard]) -> list[LatentCard]:
    """A card of every latent that fires, with contexts only if given, ordered by evidence of being
    exclusive."""
    crosscoder, (_, firing, evidence), groups = measured
    given = {card.latent: card for card in cards}
    relative = relative_decoder_norms(crosscoder).tolist()
    rates, means, maxima = firing.rates.tolist(), firing.means.tolist(), firing.maxima.tolist()
    columns = {} if evidence is None else {k: v.tolist() for k, v in evidence._asdict().items()}
    order = firing.sums.argsort(descending=True).tolist()
    if evidence is not None:
        order = [*ranking(evidence).tolist(), *order]
    found = [
        given.get(i)
        or LatentCard(
            latent=i,
            partition=crosscoder.partition.name_of(i),
            firing_rate=rates[i],
            mean_activation=means[i],
            max_activation=maxima[i],
            relative_decoder_norm=relative[i],
            encoder_decoder_cosine={},
            contexts=[],
            logit_effects={},
            evidence={name: values[i] for name, values in columns.items()},
            verdict="" if evidence is None else verdict(evidence, i),
        )
        for i in dict.fromkeys(order)
        if rates[i] > 0
    ]
    return [replace(card, verdict=_on_group(card, groups)) for card in found] if groups else found


def _on_group(card: LatentCard, groups: Mapping[str, Tensor]) -> str:
    """A card's verdict, and the group of text on which its latent fires most."""
    name, share = top_group(groups, card.latent)
    return "; ".join(filter(None, [card.verdict, f"{share:.0%} of its firings are on {name}"]))


def report_settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """The settings to show, by dotted name."""
    values = cfg.to_dict()
    shown: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in ("sae", "model_a", "model_b"):
            shown |= {f"{name}.{key}": v for key, v in value.items() if key != "metadata"}
        elif name != "logger":
            shown[name] = value
    return shown
