"""A run's latents in an order of one's choice, each with its text: what `sae-lens-dfc latents` does."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from simple_parsing import field
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.activations import Bookmark, PairedRows
from sae_lens_dfc.contexts import PairCounts, Part
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.gathering import Gathered, LatentCollector
from sae_lens_dfc.held_out import HeldOutOptions, held_out_text, opened_run
from sae_lens_dfc.latent_lines import contrast_of, latent_line, marked_text
from sae_lens_dfc.latents import MIN_FIRINGS, LatentCard, latent_cards
from sae_lens_dfc.measured_run import LATENTS_FILENAME, read_evidence
from sae_lens_dfc.metrics.claims import LatentEvidence, ranking
from sae_lens_dfc.metrics.contrast import ContextMaxima, Contrast, contrast
from sae_lens_dfc.metrics.exclusivity import relative_decoder_differences, relative_decoder_norms
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.stitching import fit_stitching
from sae_lens_dfc.output import say
from sae_lens_dfc.training.data import PairedText

Taker = Callable[[PairedRows, Float[Tensor, "n d_sae"]], None]
"""Counts rows and their code in."""
ACTIVATION, FIRING_RATE, RELATIVE = "activation", "firing_rate", "relative_decoder_norm"
DIFFERENCE, EVIDENCE, CONTRAST = "difference", "evidence", "contrast"
SORTS = [ACTIVATION, FIRING_RATE, RELATIVE, DIFFERENCE, EVIDENCE, CONTRAST]


@dataclass(kw_only=True)
class LatentsOptions(HeldOutOptions):
    """List a trained crosscoder's latents on held-out text: how strong each is, where it fires, what it promotes, whether it is exclusive."""

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    partition: str | None = field(default=None, choices=[A_EXCLUSIVE, B_EXCLUSIVE, SHARED])
    """Only latents of this partition; none takes all."""
    sort: str = field(default=ACTIVATION, choices=SORTS)
    """What comes first. activation: the largest activation in sum. firing_rate: the most often. relative_decoder_norm: the most
    one-sided. difference: decoders that differ most between the models, as they are where the two widths are one, else moved by a map
    fitted to this text. evidence: the most evidence of being one model's alone. contrast: what tells this text from --against best."""
    top: int = 20
    """How many."""
    evidence: str | None = None
    """Folder that `evaluate RUN --output` wrote; none looks in RUN."""
    against: str | None = None
    """A second text, all of it, to compare with: what fires on this and not on that."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}.")
        if self.sort == CONTRAST and self.against is None:
            raise ValueError(
                "--sort contrast compares two texts. Name the other one with --against."
            )


@dataclass(frozen=True)
class Listing:
    """The chosen latents, in order."""

    cards: list[LatentCard]
    contrast: Contrast | None
    """Of all latents, where there are two texts."""
    n_pairs: int
    """Held-out pairs that were read."""
    has_evidence: bool


def list_latents(options: LatentsOptions) -> None:
    """Print a run's latents."""
    listing = listed(options)
    if options.json:
        say(json.dumps(_as_json(listing)))
        return
    where = "" if options.partition is None else f" of {options.partition}"
    if not listing.cards:
        say(f"No latent{where} fired {MIN_FIRINGS} times or more on {listing.n_pairs:,} pairs.")
    for card in listing.cards:
        say(latent_line(card, listing.contrast))
        if card.contexts:
            say(f"       {marked_text(card)}")
    if not listing.has_evidence:
        say(
            "Whether a latent is one model's alone was not measured: `sae-lens-dfc evaluate RUN --output FOLDER` does, and "
            "--evidence FOLDER shows it here."
        )


def listed(options: LatentsOptions) -> Listing:
    """Read the text once and make cards of the chosen latents.

    Raises:
        ValueError: There is no such run, text or evidence, or the partition is empty.
    """
    evidence = _checked(options)
    # Whole models: what a latent promotes is read off their unembeddings.
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
    """The evidence, where there is any; what cannot be listed is refused here, before the models are opened."""
    crosscoder = load_crosscoder(options.run)
    sizes = crosscoder.partition.sizes
    if options.partition is not None and sizes[options.partition] == 0:
        there = ", ".join(f"{name}: {n}" for name, n in sizes.items())
        raise ValueError(
            f"The crosscoder in {options.run} has no latent in {options.partition} ({there}). Leave --partition out; "
            "--sort relative_decoder_norm puts its one-sided latents first."
        )
    evidence = evidence_of(options.run, options.evidence, crosscoder)
    if evidence is None and options.sort == EVIDENCE:
        raise ValueError(
            f"--sort evidence: whether latents are one model's alone was not measured of {options.run}. Run `sae-lens-dfc "
            f"evaluate {options.run} --output FOLDER` and give --evidence FOLDER, or sort by something else."
        )
    return evidence


def evidence_of(run: str, folder: str | None, crosscoder: Crosscoder) -> LatentEvidence | None:
    """What was measured of the latents' exclusivity, in a folder of `evaluate --output` or else in the run; none where nothing was.

    Raises:
        ValueError: The folder named has none, or it is of another crosscoder.
    """
    path = Path(folder or run) / LATENTS_FILENAME
    evidence = read_evidence(path, crosscoder.cfg.d_sae)
    if evidence is None:
        if folder is not None:
            raise ValueError(
                f"{path} is not there or has no evidence. Give the folder that `evaluate {run} --output` wrote."
            )
        return None
    own, theirs = relative_decoder_norms(crosscoder).cpu(), evidence.relative_decoder_norm
    if own.shape != theirs.shape or not torch.allclose(own, theirs, atol=1e-3):
        raise ValueError(
            f"{path} is of another crosscoder than {run}: their decoder norms differ. Run `sae-lens-dfc evaluate {run} "
            "--output FOLDER` and give that folder."
        )
    return evidence


@torch.no_grad()
def _read(
    crosscoder: Crosscoder, text: PairedText, part: Part, name: str, takers: Sequence[Taker]
) -> Bookmark:
    """Give each batch of a text and its code to all `takers`; where the text ends."""
    counts, after = PairCounts(), Bookmark()
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
    crosscoder: Crosscoder, gathered: Gathered, moments: PairMoments, sort: str
) -> Float[Tensor, " d_sae"]:
    """What latents are sorted by, the largest first."""
    if sort == DIFFERENCE:
        d_a, d_b = crosscoder.cfg.d_a, crosscoder.cfg.d_b
        stitching = None if d_a == d_b else fit_stitching(moments, d_a).to(crosscoder.device)
        return relative_decoder_differences(crosscoder, stitching)
    if sort == RELATIVE:
        return (relative_decoder_norms(crosscoder) - 0.5).abs()
    return gathered.firing.rates if sort == FIRING_RATE else gathered.firing.sums


def _chosen(order: Int[Tensor, " n"], gathered: Gathered, options: LatentsOptions) -> list[int]:
    """The first latents of the partition that fired often enough."""
    slices = gathered.firing.partition.slices
    where = slices.get(options.partition or "", slice(0, len(gathered.firing.counts)))
    order = order.cpu()
    order = order[(order >= where.start) & (order < where.stop)]
    return order[gathered.firing.counts[order] >= MIN_FIRINGS][: options.top].tolist()


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
    # Where nothing varies in either text d is infinite, and JSON has no word for it.
    return {"contrast": {name: value for name, value in values.items() if math.isfinite(value)}}
