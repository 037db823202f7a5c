"""A run's latents in an order of one's choice, each with its text: what `sae-lens-dfc latents` does."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from simple_parsing import field
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.activations import Bookmark
from sae_lens_dfc.assess import known
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

logger = logging.getLogger(__name__)

EVIDENCE, CONTRAST, DIFFERENCE = "evidence", "contrast", "difference"
SORTS = ["activation", "firing_rate", "relative_decoder_norm", DIFFERENCE, EVIDENCE, CONTRAST]


@dataclass(kw_only=True)
class LatentsOptions(HeldOutOptions):
    """List a trained crosscoder's latents on held-out text: how strong each is, where it fires, what it promotes, whether it is exclusive."""

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    partition: str | None = field(default=None, choices=[A_EXCLUSIVE, B_EXCLUSIVE, SHARED])
    """Only latents of this partition; none takes all."""
    sort: str = field(default="activation", choices=SORTS)
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
    crosscoder = load_crosscoder(options.run)
    _check_partition(crosscoder, options)
    evidence = evidence_of(options.run, options.evidence, crosscoder)
    if evidence is None and options.sort == EVIDENCE:
        raise ValueError(
            f"--sort evidence: whether latents are one model's alone was not measured of {options.run}. Run `sae-lens-dfc "
            f"evaluate {options.run} --output FOLDER` and give --evidence FOLDER, or sort by something else."
        )
    # Whole models: what a latent promotes is read off their unembeddings.
    crosscoder, _, pair = opened_run(options.run, options, drop_unused_layers=False)
    text, part = held_out_text(options.run, options, pair)
    reading = _Reading.of(crosscoder, options)
    after = reading.read(text, part, "Held-out text")
    compared = None
    if options.against is not None:
        other, all_of_it = held_out_text(
            options.run, replace(options, dataset=options.against), pair
        )
        there = _Reading(crosscoder, maxima=_maxima(crosscoder))
        there.read(other, all_of_it, "The other text")
        assert reading.maxima is not None and there.maxima is not None
        compared = contrast(reading.maxima, there.maxima)
    assert reading.collector is not None
    gathered = reading.collector.finish()
    order = _order(crosscoder, gathered, reading.moments, evidence, compared, options)
    places = {latent: gathered.places(latent) for latent in order[: options.top]}
    shown = {place.context for of_latent in places.values() for place in of_latent}
    rows = text.rows_of(part, shown, after)
    cards = latent_cards(crosscoder, gathered, places, rows, pair, evidence)
    return Listing(cards, compared, gathered.firing.n, evidence is not None)


def _check_partition(crosscoder: Crosscoder, options: LatentsOptions) -> None:
    sizes = crosscoder.partition.sizes
    if options.partition is not None and sizes[options.partition] == 0:
        there = ", ".join(f"{name}: {n}" for name, n in sizes.items())
        raise ValueError(
            f"The crosscoder in {options.run} has no latent in {options.partition} ({there}). Leave --partition out; "
            "--sort relative_decoder_norm puts its one-sided latents first."
        )


def evidence_of(run: str, folder: str | None, crosscoder: Crosscoder) -> LatentEvidence | None:
    """What was measured of the latents' exclusivity, in a folder of `evaluate --output` or else in the run; none where nothing was.

    Raises:
        ValueError: The folder named has none, or it is of another crosscoder.
    """
    path = Path(folder or run) / LATENTS_FILENAME
    evidence = read_evidence(path)
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


@dataclass
class _Reading:
    """One pass over a text, with all that is asked of it."""

    crosscoder: Crosscoder
    collector: LatentCollector | None = None
    maxima: ContextMaxima | None = None
    moments: PairMoments | None = None

    @classmethod
    def of(cls, crosscoder: Crosscoder, options: LatentsOptions) -> "_Reading":
        has_one_width = crosscoder.cfg.d_a == crosscoder.cfg.d_b
        needs_map = options.sort == DIFFERENCE and not has_one_width
        return cls(
            crosscoder,
            LatentCollector(crosscoder.partition, device=crosscoder.device),
            None if options.against is None else _maxima(crosscoder),
            PairMoments() if needs_map else None,
        )

    @torch.no_grad()
    def read(self, text: PairedText, part: Part, name: str) -> Bookmark:
        """Read it, and say where it ends."""
        counts, after = PairCounts(), Bookmark()
        for rows in tqdm(text.rows(part, counts), name, unit=" batches"):
            acts = rows.acts.to(self.crosscoder.device)
            feature_acts = self.crosscoder.encode(acts)
            if self.collector is not None:
                self.collector.update(rows, feature_acts)
            if self.maxima is not None:
                self.maxima.update(feature_acts, rows.context)
            if self.moments is not None:
                self.moments.update(acts)
            after = rows.after
        if counts.pairs == 0:
            raise ValueError(
                f"{name} has no pair of activations: {counts.texts} documents were read. Give more text with --dataset, or "
                "a run that holds more out."
            )
        return after


def _maxima(crosscoder: Crosscoder) -> ContextMaxima:
    return ContextMaxima(crosscoder.cfg.d_sae, device=crosscoder.device)


def _order(
    crosscoder: Crosscoder,
    gathered: Gathered,
    moments: PairMoments | None,
    evidence: LatentEvidence | None,
    compared: Contrast | None,
    options: LatentsOptions,
) -> list[int]:
    """The latents of the partition that fired often enough, as they are to be listed."""
    if options.sort == EVIDENCE:
        assert evidence is not None
        order = ranking(evidence).tolist()
    else:
        order = (
            _strength(crosscoder, gathered, moments, compared, options.sort)
            .argsort(descending=True, stable=True)
            .tolist()
        )
    where = crosscoder.partition.slices.get(options.partition or "", slice(0, None))
    chosen = range(crosscoder.cfg.d_sae)[where]
    often = (gathered.firing.counts >= MIN_FIRINGS).tolist()
    return [latent for latent in order if latent in chosen and often[latent]]


def _strength(
    crosscoder: Crosscoder,
    gathered: Gathered,
    moments: PairMoments | None,
    compared: Contrast | None,
    sort: str,
) -> Float[Tensor, " d_sae"]:
    """What to sort by, the largest first."""
    if sort == "activation":
        return gathered.firing.sums
    if sort == "firing_rate":
        return gathered.firing.rates
    if sort == CONTRAST:
        assert compared is not None
        return compared.auroc.cpu()
    if sort == DIFFERENCE:
        stitching = None if moments is None else fit_stitching(moments, crosscoder.cfg.d_a)
        return relative_decoder_differences(crosscoder, stitching).cpu()
    return (relative_decoder_norms(crosscoder) - 0.5).abs().cpu()


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
    return {"contrast": known(contrast_of(listing.contrast, card.latent))}
