"""Builds latent cards: statistics, promoted tokens and max-activating examples, shown in both
models' tokens."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.latents.max_activating import FiringPosition, MaxActivatingExamples
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import (
    encoder_decoder_cosines,
    relative_decoder_norms,
)
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, verdict
from sae_lens_dfc.metrics.sparsity import ActivationStats
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.models.decoding import spelled
from sae_lens_dfc.models.logit_lens import extreme_tokens, has_direct_effect

# Latents that fired less often are not shown: so few contexts do not reveal when a latent fires.
MIN_FIRINGS_OF_CARD = 5
TOKENS_AROUND = 12
TOKENS_SHOWN = 10


@dataclass(frozen=True)
class SegmentView:
    """A segment of text between two paired positions, in each model's tokens, with the latent's
    activation."""

    tokens_a: list[str]
    tokens_b: list[str]
    activation: float


@dataclass(frozen=True)
class ContextView:
    """A window of text around one firing."""

    segments: list[SegmentView]
    document: int
    """Number of the document in its source, from 0."""
    position_a: int
    """Position of the firing token in model A's context, which starts with A's
    beginning-of-sequence token if it has one."""
    position_b: int
    """The same in model B's context."""
    activation: float
    """Activation at the firing."""
    quantile: int | None
    """None for a max-activating example; otherwise the quantile of the latent's activations that it
    was sampled from, 0 being the weakest."""


@dataclass(frozen=True)
class LogitEffect:
    """Tokens whose logits a latent's decoder direction raises and lowers most, with the change; see
    `direct_logit_effects`."""

    promoted: list[tuple[str, float]]
    """Largest first."""
    suppressed: list[tuple[str, float]]
    """Most negative first."""


@dataclass(frozen=True)
class LatentCard:
    """Summary of one latent."""

    latent: int
    partition: str
    firing_rate: float
    """Share of the held-out pairs on which it fires."""
    mean_activation: float
    """Mean over the pairs on which it fires."""
    max_activation: float
    relative_decoder_norm: float
    """1: exclusive to A; 0: exclusive to B."""
    encoder_decoder_cosine: dict[str, float]
    """Cosine of encoder and decoder direction in each model (`a`, `b`) whose weights it may use."""
    contexts: list[ContextView]
    """Max-activating examples, strongest first, one per context; then examples from each quantile,
    weakest first."""
    logit_effects: dict[str, LogitEffect]
    """Per model whose weights it may use, if the hook has a direct effect on the logits; see
    `has_direct_effect`."""
    evidence: dict[str, float | bool]
    """Exclusivity measures by their names in `LatentEvidence`; empty if not measured."""
    verdict: str = ""
    """Whether it is exclusive with evidence, and the reason; empty if not measured."""


def strongest_latents(firing: ActivationStats, n_per_partition: int) -> list[int]:
    """The latents with the largest summed activation in each partition, among those that fired at
    least 5 times.

    The sum is used because the mean over firings would put latents that only mark the start of a
    context first.
    """
    latents: list[int] = []
    strength = torch.where(firing.counts >= MIN_FIRINGS_OF_CARD, firing.sums, 0)
    for where in firing.partition.slices.values():
        order = strength[where].argsort(descending=True)[:n_per_partition]
        latents += [where.start + int(i) for i in order if strength[where][i] > 0]
    return latents


@torch.no_grad()
def latent_cards(
    crosscoder: Crosscoder,
    gathered: MaxActivatingExamples,
    places: Mapping[int, Sequence[FiringPosition]],
    rows: Iterable[PairedRows],
    pair: ModelPair,
    evidence: LatentEvidence | None = None,
) -> list[LatentCard]:
    """Cards of the latents in `places`, with the text around each place.

    Args:
        crosscoder: The saved crosscoder.
        gathered: Max-activating examples from a pass over the text.
        places: The firings to show for each latent; see `MaxActivatingExamples.places`.
        rows: Rows of all contexts in `places`, with their contexts; may include others.
        pair: The models, for their tokenizers and unembeddings.
        evidence: Exclusivity evidence of all latents.

    Raises:
        ValueError: A context in `places` is not among the rows.
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
    crosscoder: Crosscoder, pair: ModelPair, m: ModelName, latents: Sequence[int]
) -> list[LogitEffect]:
    model = pair.models[m]
    if not has_direct_effect(model):
        return []
    directions = crosscoder.W_dec[list(latents), crosscoder.partition.models[m]].float()
    return [LogitEffect(*extremes) for extremes in extreme_tokens(model, directions, TOKENS_SHOWN)]


def _views(
    crosscoder: Crosscoder,
    places: Mapping[int, Sequence[FiringPosition]],
    rows: Iterable[PairedRows],
    pair: ModelPair,
) -> dict[tuple[int, FiringPosition], ContextView]:
    """The window around each place, by latent and place."""
    asked: dict[int, list[tuple[int, FiringPosition]]] = {}
    for latent, of_latent in places.items():
        for place in of_latent:
            asked.setdefault(place.context, []).append((latent, place))
    column = {latent: i for i, latent in enumerate(places)}
    views: dict[tuple[int, FiringPosition], ContextView] = {}
    for batch in rows:
        for context, segment, acts in _by_context(crosscoder, batch, asked, list(column)):
            for latent, place in asked[context.number]:
                at = dict(zip(segment, acts[:, column[latent]].tolist(), strict=True))
                # Rerunning the models with a different batch may change activations by rounding.
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
    """Each requested context of a batch, with its rows' segments and the latents' activations."""
    contexts = [context for context in batch.contexts if context.number in wanted]
    if not contexts:
        return
    rows, _ = rows_in(batch, contexts)
    feature_acts = crosscoder.encode(rows.acts.to(crosscoder.device))[:, latents].float().cpu()
    for context in contexts:
        own = rows.context == context.number
        yield context, rows.segment[own].tolist(), feature_acts[own]


def _view(
    context: Context, place: FiringPosition, activations: Mapping[int, float], pair: ModelPair
) -> ContextView:
    first = max(1, place.segment - TOKENS_AROUND)
    segments = context.segments
    window = list(segments[first : place.segment + TOKENS_AROUND + 1])
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
