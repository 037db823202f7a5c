"""Reading latents: which are strong, and the text in which they fire, in both models' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.claims import LatentEvidence, verdict
from sae_lens_dfc.metrics.exclusivity import relative_decoder_norms
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segment

# A latent that fired less often is not worth a reader's time: its contexts say nothing of the next one.
MIN_FIRINGS = 5
WINDOW = 12


@dataclass(frozen=True)
class SegmentView:
    """A stretch of text between two shared positions, as each model's tokens, and the latent's activation there."""

    tokens_a: list[str]
    tokens_b: list[str]
    activation: float


@dataclass(frozen=True)
class ContextView:
    """A place where a latent fires, with the text around it."""

    segments: list[SegmentView]
    document: int
    position_a: int
    position_b: int
    activation: float
    quantile: int | None
    """None among the strongest; 0 and up from that quantile of its activations, weakest first."""


@dataclass(frozen=True)
class LogitEffect:
    """The tokens whose logits a latent's direction raises and lowers most."""

    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


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
    """By model, of those it has."""
    contexts: list[ContextView]
    """Where it fires most, strongest first, then from the quantiles of its activations."""
    logit_effects: dict[str, LogitEffect]
    """By model."""
    evidence: dict[str, float | bool]
    """What was measured of its exclusivity, by the names of `LatentEvidence`."""
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
    firing: Firing,
    latents: Sequence[int],
    rows: Sequence[PairedRows],
    contexts: Sequence[Sequence[Segment]],
    pair: ModelPair,
    evidence: LatentEvidence | None = None,
    n_contexts: int = 4,
) -> list[LatentCard]:
    """Cards of `latents`, with the contexts in which each fires most, one from a context.

    Args:
        crosscoder: The saved crosscoder.
        firing: Its firing on these rows.
        latents: Which latents.
        rows: Activations, all at these contexts.
        contexts: The text of the rows.
        pair: The models, for their tokenizers.
        evidence: Of all latents, to say what each is called.
        n_contexts: Contexts on a card.
    """
    if not latents:
        return []
    encoded = [crosscoder.encode(r.acts.to(crosscoder.device))[:, latents] for r in rows]
    acts = torch.cat(encoded).cpu()
    context, segment = torch.cat([r.context for r in rows]), torch.cat([r.segment for r in rows])
    relative = relative_decoder_norms(crosscoder)
    return [
        LatentCard(
            latent=latent,
            partition=crosscoder.partition.name_of(latent),
            firing_rate=firing.rates[latent].item(),
            mean_activation=firing.means[latent].item(),
            max_activation=firing.maxima[latent].item(),
            relative_decoder_norm=relative[latent].item(),
            encoder_decoder_cosine={},
            contexts=[
                _view(acts[:, i], context, segment, row, contexts, pair)
                for row in _top_rows(acts[:, i], context, n_contexts)
            ],
            logit_effects={},
            evidence={}
            if evidence is None
            else {k: v[latent].item() for k, v in evidence._asdict().items()},
            verdict="" if evidence is None else verdict(evidence, latent),
        )
        for i, latent in enumerate(latents)
    ]


def _top_rows(acts: Float[Tensor, " n"], context: Tensor, n: int) -> list[int]:
    """Rows of the `n` largest activations, at most one in a context."""
    rows: dict[int, int] = {}
    for row in acts.argsort(descending=True).tolist():
        if len(rows) == n or acts[row] <= 0:
            break
        rows.setdefault(int(context[row]), row)
    return list(rows.values())


def _view(
    acts: Tensor,
    context: Tensor,
    segment: Tensor,
    row: int,
    contexts: Sequence[Sequence[Segment]],
    pair: ModelPair,
) -> ContextView:
    number, centre = int(context[row]), int(segment[row])
    here = context == number
    at = dict(zip(segment[here].tolist(), acts[here].tolist(), strict=True))
    first = max(1, centre - WINDOW)
    window = contexts[number][first : centre + WINDOW + 1]
    texts_a = _spell(pair.a.tokenizer, [s.ids_a for s in window])
    texts_b = _spell(pair.b.tokenizer, [s.ids_b for s in window])
    segments = [
        SegmentView(tokens_a, tokens_b, at.get(first + i, 0.0))
        for i, (tokens_a, tokens_b) in enumerate(zip(texts_a, texts_b, strict=True))
    ]
    before = contexts[number][: centre + 1]
    position_a, position_b = (
        sum(map(len, ids)) - 1 for ids in ([s.ids_a for s in before], [s.ids_b for s in before])
    )
    return ContextView(segments, number, position_a, position_b, acts[row].item(), None)


def _spell(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Sequence[int]]
) -> list[list[str]]:
    """Each token's text; of tokens that hold bytes of one character, the last gets the character.

    Decoded from the start each time, since some tokenizers drop the space before what they decode first.
    """
    texts: list[list[str]] = []
    ids: list[int] = []
    shown = text = ""
    for segment in segments:
        texts.append([])
        for i in segment:
            ids.append(i)
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            is_whole = not text.endswith("\ufffd")
            texts[-1].append(text[len(shown) :] if is_whole else "")
            shown = text if is_whole else shown
        if texts[-1] and not texts[-1][-1]:
            # The segment ends here whatever its last bytes decode to.
            texts[-1][-1] = text[len(shown) :]
            shown = text
    return texts
