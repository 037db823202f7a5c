"""Runs `sae-lens-dfc latents`: lists a run's latents in a chosen order, each with its top
example."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.latents.cards import MIN_FIRINGS_OF_CARD, LatentCard, latent_cards
from sae_lens_dfc.analysis.latents.contrast import ContextMaxima, Contrast, contrast
from sae_lens_dfc.analysis.latents.max_activating import LatentCollector, MaxActivatingExamples
from sae_lens_dfc.analysis.latents.text_view import contrast_of, latent_line, marked_text
from sae_lens_dfc.analysis.options import (
    CONTRAST,
    DIFFERENCE,
    EVIDENCE,
    FIRING_RATE,
    RELATIVE,
    LatentsOptions,
)
from sae_lens_dfc.analysis.saved_run.held_out import evidence_of, held_out_text, opened_run
from sae_lens_dfc.core.terminal import print_result
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder
from sae_lens_dfc.data.activations import PairedRows, StreamState
from sae_lens_dfc.data.contexts import PairCounts, Part
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.exclusivity.decoders import (
    relative_decoder_differences,
    relative_decoder_norms,
)
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking
from sae_lens_dfc.stats.affine_maps import fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments

Taker = Callable[[PairedRows, Float[Tensor, "n d_sae"]], None]
"""Consumes rows and their feature activations."""


@dataclass(frozen=True)
class Listing:
    """The selected latents, in order."""

    cards: list[LatentCard]
    contrast: Contrast | None
    """Contrast of all latents, if there are two texts."""
    n_pairs: int
    """Number of held-out pairs read."""
    has_evidence: bool


def list_latents(options: LatentsOptions) -> None:
    """Print a run's latents."""
    listing = listed(options)
    if options.json:
        print_result(json.dumps(_as_json(listing)))
        return
    where = "" if options.partition is None else f" of {options.partition}"
    if not listing.cards:
        print_result(
            f"No latent{where} fired {MIN_FIRINGS_OF_CARD} times or more on {listing.n_pairs:,} pairs."
        )
    for card in listing.cards:
        print_result(latent_line(card, listing.contrast))
        if card.contexts:
            print_result(f"       {marked_text(card)}")
    if not listing.has_evidence:
        print_result(
            "Exclusivity was not measured: `sae-lens-dfc evaluate RUN --output FOLDER` measures it, and "
            "--evidence FOLDER shows it here."
        )


def listed(options: LatentsOptions) -> Listing:
    """Read the text once and build cards of the selected latents.

    Raises:
        ValueError: The run, text or evidence does not exist, or the partition is empty.
    """
    evidence = _checked(options)
    # All layers are loaded: promoted tokens need the unembeddings.
    crosscoder, _, pair = opened_run(options.run, options, drop_unused_layers=False)
    text, part = held_out_text(options.run, options, pair)
    collector = LatentCollector(crosscoder.partition, device=crosscoder.device)
    moments = PairMoments()
    takers: list[Taker] = [collector.update]
    if options.sort == DIFFERENCE and crosscoder.cfg.d_a != crosscoder.cfg.d_b:
        takers.append(lambda rows, _: moments.update(rows.acts))
    compared = None
    if options.against is None:
        after = _read(crosscoder, text, part, "Held-out text", takers)
    else:
        here, there = (ContextMaxima(crosscoder.cfg.d_sae, device=crosscoder.device) for _ in "12")
        takers.append(lambda rows, acts: here.update(acts, rows.context))
        after = _read(crosscoder, text, part, "Held-out text", takers)
        other = held_out_text(options.run, replace(options, dataset=options.against), pair)
        count: Taker = lambda rows, acts: there.update(acts, rows.context)
        _read(crosscoder, *other, "The other text", [count])
        compared = contrast(here, there)
    gathered = collector.finish()
    if options.sort == EVIDENCE and evidence is not None:
        order = ranking(evidence)
    elif options.sort == CONTRAST and compared is not None:
        order = compared.order
    else:
        measure = _measure(crosscoder, gathered, moments, options.sort)
        order = measure.argsort(descending=True, stable=True)
    chosen = _chosen(order, gathered, options)
    places = {latent: gathered.places(latent) for latent in chosen}
    shown = {place.context for of_latent in places.values() for place in of_latent}
    rows = text.rows_of(part, shown, after)
    cards = latent_cards(crosscoder, gathered, places, rows, pair, evidence)
    return Listing(cards, compared, gathered.firing.n, evidence is not None)


def _checked(options: LatentsOptions) -> LatentEvidence | None:
    """The evidence, if any. Invalid requests fail here, before the models are loaded."""
    crosscoder = load_crosscoder(options.run)
    sizes = crosscoder.partition.sizes
    if options.partition is not None and sizes[options.partition] == 0:
        there = ", ".join(f"{name}: {n}" for name, n in sizes.items())
        raise ValueError(
            f"The crosscoder in {options.run} has no latent in {options.partition} ({there}). Leave --partition out; "
            "--sort relative_decoder_norm lists its most one-sided latents first."
        )
    evidence = evidence_of(options.run, options.evidence, crosscoder)
    if evidence is None and options.sort == EVIDENCE:
        raise ValueError(
            f"--sort evidence needs exclusivity evidence, which was not measured for {options.run}. Run `sae-lens-dfc "
            f"evaluate {options.run} --output FOLDER` and give --evidence FOLDER, or sort by something else."
        )
    return evidence


@torch.no_grad()
def _read(
    crosscoder: Crosscoder, text: PairedText, part: Part, name: str, takers: Sequence[Taker]
) -> StreamState:
    """Pass each batch of a text, with its feature activations, to all `takers`; returns the
    position where the text ends."""
    counts, after = PairCounts(), StreamState()
    for rows in tqdm(text.rows(part, counts), name, unit=" batches"):
        feature_acts = crosscoder.encode(rows.acts.to(crosscoder.device))
        for take in takers:
            take(rows, feature_acts)
        after = rows.after
    if counts.pairs == 0:
        raise ValueError(
            f"{name} has no pair of activations: {counts.texts} documents were read. Give more text."
        )
    return after


def _measure(
    crosscoder: Crosscoder, gathered: MaxActivatingExamples, moments: PairMoments, sort: str
) -> Float[Tensor, " d_sae"]:
    """The sort key of each latent; largest first."""
    if sort == DIFFERENCE:
        d_a, d_b = crosscoder.cfg.d_a, crosscoder.cfg.d_b
        affine_maps = None if d_a == d_b else fit_affine_maps(moments, d_a).to(crosscoder.device)
        return relative_decoder_differences(crosscoder, affine_maps)
    if sort == RELATIVE:
        return (relative_decoder_norms(crosscoder) - 0.5).abs()
    return gathered.firing.rates if sort == FIRING_RATE else gathered.firing.sums


def _chosen(
    order: Int[Tensor, " n"], gathered: MaxActivatingExamples, options: LatentsOptions
) -> list[int]:
    """The first latents of the partition that fired at least `MIN_FIRINGS_OF_CARD` times."""
    slices = gathered.firing.partition.slices
    where = slices.get(options.partition or "", slice(0, len(gathered.firing.counts)))
    order = order.cpu()
    order = order[(order >= where.start) & (order < where.stop)]
    return order[gathered.firing.counts[order] >= MIN_FIRINGS_OF_CARD][: options.top].tolist()


def _as_json(listing: Listing) -> dict[str, Any]:
    latents = [{**asdict(card), **_contrast_of(listing, card)} for card in listing.cards]
    return {
        "pairs_evaluated": listing.n_pairs,
        "has_evidence": listing.has_evidence,
        "latents": latents,
    }


def _contrast_of(listing: Listing, card: LatentCard) -> dict[str, dict[str, float]]:
    if listing.contrast is None:
        return {}
    values = contrast_of(listing.contrast, card.latent)
    # d is infinite if a latent varies in neither text; JSON cannot represent infinity.
    return {"contrast": {name: value for name, value in values.items() if math.isfinite(value)}}
