"""Reading latents: which are strong, and a card of each with its text in both models' tokens."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.contexts import Context
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.gathering import Gathered, Place
from sae_lens_dfc.metrics.claims import LatentEvidence, verdict
from sae_lens_dfc.metrics.exclusivity import encoder_decoder_cosines, relative_decoder_norms
from sae_lens_dfc.metrics.logit_effects import extreme_tokens, has_direct_effect
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.tokens import spelled

# A latent that fired less often is not worth a reader's time: its contexts say nothing of the next one.
MIN_FIRINGS = 5
WINDOW = 12
N_TOKENS = 10


@dataclass(frozen=True)
class SegmentView:
    """A stretch of text between two shared positions, as each model's tokens, and the latent's activation there."""

    tokens_a: list[str]
    tokens_b: list[str]
    activation: float


@dataclass(frozen=True)
class ContextView:
    """A window of text around a firing."""

    segments: list[SegmentView]
    document: int
    """Number of the document in its source, from 0."""
    position_a: int
    """Position of the firing token in model A's context, which starts with A's beginning-of-sequence token if it has one."""
    position_b: int
    """The same in model B's."""
    activation: float
    """At the firing."""
    quantile: int | None
    """None for the strongest firings; else from which quantile of the latent's activations it was drawn, 0 the weakest."""


@dataclass(frozen=True)
class LogitEffect:
    """Tokens whose logits a latent's decoder raises and lowers most, with by how much; see `direct_logit_effects`."""

    promoted: list[tuple[str, float]]
    """Largest first."""
    suppressed: list[tuple[str, float]]
    """Most negative first."""


@dataclass(frozen=True)
class LatentCard:
    """What there is to know of one latent."""

    latent: int
    partition: str
    firing_rate: float
    """Share of the held-out pairs on which it fires."""
    mean_activation: float
    """Mean over the pairs on which it fires."""
    max_activation: float
    relative_decoder_norm: float
    """1 is A's alone, 0 is B's alone."""
    encoder_decoder_cosine: dict[str, float]
    """Cosine of what it reads and what it writes, in each model (`a`, `b`) that it may use."""
    contexts: list[ContextView]
    """Where it fires most, strongest first, one from a context; then some from each quantile, weakest first."""
    logit_effects: dict[str, LogitEffect]
    """In each model that it may use, where that has a direct effect; see `has_direct_effect`."""
    evidence: dict[str, float | bool]
    """What was measured of its exclusivity, by the names of `LatentEvidence`; empty where nothing was."""
    verdict: str = ""
    """Whether it is called exclusive, and why or why not; empty where that was not measured."""


def strongest_latents(firing: Firing, n_per_partition: int) -> list[int]:
    """In each partition, the latents with the largest activation in sum, among those that fired at least 5 times.

    Ranked by the mean where they fire, latents that only mark the start of a context come first.
    """
    latents: list[int] = []
    strength = torch.where(firing.counts >= MIN_FIRINGS, firing.sums, 0)
    for where in firing.partition.slices.values():
        order = strength[where].argsort(descending=True)[:n_per_partition]
        latents += [where.start + int(i) for i in order if strength[where][i] > 0]
    return latents


@torch.no_grad()
def latent_cards(
    crosscoder: Crosscoder,
    gathered: Gathered,
    places: Mapping[int, Sequence[Place]],
    rows: Iterable[PairedRows],
    pair: ModelPair,
    evidence: LatentEvidence | None = None,
) -> list[LatentCard]:
    """Cards of the latents in `places`, with the text around these.

    Args:
        crosscoder: The saved crosscoder.
        gathered: What a pass over the text said.
        places: The firings to show of each latent; see `Gathered.places`.
        rows: The rows of all contexts in `places`, with their contexts; others may be among them.
        pair: The models, for their tokenizers and unembeddings.
        evidence: Of all latents, to say what each is called.

    Raises:
        ValueError: A context that `places` names is not among the rows.
    """
    latents = list(places)
    if not latents:
        return []
    views = _views(crosscoder, places, rows, pair)
    cosines = encoder_decoder_cosines(crosscoder, latents)
    effects = {m: _logit_effects(crosscoder, pair, m, latents) for m in crosscoder.partition.models}
    relative, firing = relative_decoder_norms(crosscoder), gathered.firing
    cards: list[LatentCard] = []
    for i, latent in enumerate(latents):
        partition = crosscoder.partition.name_of(latent)
        models = {A_EXCLUSIVE: "a", B_EXCLUSIVE: "b"}.get(partition, "ab")
        cards.append(
            LatentCard(
                latent=latent,
                partition=partition,
                firing_rate=firing.rates[latent].item(),
                mean_activation=firing.means[latent].item(),
                max_activation=firing.maxima[latent].item(),
                relative_decoder_norm=relative[latent].item(),
                encoder_decoder_cosine={m: cosines[m][i].item() for m in models},
                contexts=[views[latent, place] for place in places[latent]],
                logit_effects={m: effects[m][i] for m in models if effects[m]},
                evidence={} if evidence is None else _evidence_of(evidence, latent),
                verdict="" if evidence is None else verdict(evidence, latent),
            )
        )
    return cards


def _evidence_of(evidence: LatentEvidence, latent: int) -> dict[str, float | bool]:
    values = {name: x[latent].item() for name, x in evidence._asdict().items()}
    return {n: value for n, value in values.items() if math.isfinite(value)}  # NaN: not measured


def _logit_effects(
    crosscoder: Crosscoder, pair: ModelPair, m: str, latents: Sequence[int]
) -> list[LogitEffect]:
    model = pair.a if m == "a" else pair.b
    if not has_direct_effect(model):
        return []
    directions = crosscoder.W_dec[list(latents), crosscoder.partition.models[m]].float()
    return [LogitEffect(*extremes) for extremes in extreme_tokens(model, directions, N_TOKENS)]


def _views(
    crosscoder: Crosscoder,
    places: Mapping[int, Sequence[Place]],
    rows: Iterable[PairedRows],
    pair: ModelPair,
) -> dict[tuple[int, Place], ContextView]:
    """The window around each place, by latent and place."""
    asked: dict[int, list[tuple[int, Place]]] = {}
    for latent, of_latent in places.items():
        for place in of_latent:
            asked.setdefault(place.context, []).append((latent, place))
    column = {latent: i for i, latent in enumerate(places)}
    views: dict[tuple[int, Place], ContextView] = {}
    for batch in rows:
        for context, segment, acts in _by_context(crosscoder, batch, asked, list(column)):
            for latent, place in asked[context.number]:
                at = dict(zip(segment, acts[:, column[latent]].tolist(), strict=True))
                # The models, run again on other contexts at once, may differ from the first time by a rounding.
                views[latent, place] = _view(
                    context, place, {**at, place.segment: place.activation}, pair
                )
    missing = asked.keys() - {place.context for _, place in views}
    if missing:
        raise ValueError(
            f"Contexts {sorted(missing)[:5]} are not among the rows given. Give the rows of all contexts that the places "
            "name, with their contexts."
        )
    return views


def _by_context(
    crosscoder: Crosscoder, batch: PairedRows, wanted: Mapping[int, object], latents: list[int]
) -> Iterator[tuple[Context, list[int], Float[Tensor, "_ latents"]]]:
    """Each wanted context of a batch, with its rows' segments and these latents' activations there."""
    contexts = [context for context in batch.contexts if context.number in wanted]
    if not contexts:
        return
    here = torch.isin(batch.context, torch.tensor([c.number for c in contexts], dtype=torch.long))
    acts = batch.acts[here.to(batch.acts.device)].to(crosscoder.device)
    feature_acts = crosscoder.encode(acts)[:, latents].float().cpu()
    number, segment = batch.context[here], batch.segment[here]
    for context in contexts:
        own = number == context.number
        yield context, segment[own].tolist(), feature_acts[own]


def _view(
    context: Context, place: Place, activations: Mapping[int, float], pair: ModelPair
) -> ContextView:
    first = max(1, place.segment - WINDOW)
    segments = context.segments
    window = list(segments[first : place.segment + WINDOW + 1])
    texts_a = spelled(pair.a.tokenizer, [s.ids_a for s in window])
    texts_b = spelled(pair.b.tokenizer, [s.ids_b for s in window])
    return ContextView(
        segments=[
            SegmentView(tokens_a, tokens_b, activations.get(first + i, 0.0))
            for i, (tokens_a, tokens_b) in enumerate(zip(texts_a, texts_b, strict=True))
        ],
        document=context.document,
        position_a=int(segments.last_a[place.segment]),
        position_b=int(segments.last_b[place.segment]),
        activation=place.activation,
        quantile=place.quantile,
    )
