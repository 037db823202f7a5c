"""Ablates a latent in both models, and measures how much each model's loss on the text that follows
rises."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_lens_dfc.analysis.steering.hooks import logits_from
from sae_lens_dfc.analysis.steering.latent_acts import latent_acts
from sae_lens_dfc.analysis.steering.splicing import Edit, reading_of, spliced
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, paired_activations, rows_in
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.models.hooked_model import HookedModel


class LossRises(NamedTuple):
    """Rise of each model's loss on the text after a firing when the latent is ablated in that model,
    in nats, for each text."""

    a: Float[Tensor, " texts"]
    b: Float[Tensor, " texts"]


@torch.no_grad()
def ablated_in_both(
    crosscoder: Crosscoder, pair: ModelPair, latent: int, windows: Sequence[Segments]
) -> LossRises:
    """Ablate a shared latent in both models, each with its own decoder, and compare what it costs
    them. No map between the models is needed.

    With `f` the latent's activation, `x_m - f d_m` replaces model m's activation at every paired
    position. The loss is measured on each window's last segment, the text between the firing and
    the next pair. Both models predict the same characters there, so the rises are comparable
    whatever the tokenizers. A model that uses what the latent represents loses by the ablation; one
    that represents it without using it does not.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole: not with `drop_unused_layers`.
        latent: A latent of the shared partition.
        windows: Texts after the pair's beginning-of-sequence segment, each up to a firing with one
            more segment. Those in which the latent does not fire there are left out, as are those
            with a NaN or infinite loss.
    """
    rows, feature_acts = _firing(crosscoder, pair, latent, windows)
    rises: dict[ModelName, Tensor] = {}
    for m, model in pair.models.items():
        decoder = crosscoder.W_dec[latent, crosscoder.partition.models[m]].float().cpu()
        rises[m] = _rises(model, m, rows, Edit(-feature_acts[:, None] * decoder, adds=True))
    known = rises["a"].isfinite() & rises["b"].isfinite()
    return LossRises(rises["a"][known], rises["b"][known])


def _firing(
    crosscoder: Crosscoder, pair: ModelPair, latent: int, windows: Sequence[Segments]
) -> tuple[PairedRows, Float[Tensor, " n"]]:
    """The rows of the windows before whose last segment the latent fires, and its activations."""
    contexts = [Context(window, i, i) for i, window in enumerate(windows)]
    batch = ContextBatch(contexts, {})
    # No outlier filter: a few texts give no reliable median.
    rows = next(iter(paired_activations(pair, [batch], PairCounts(), outlier_factor=float("inf"))))
    feature_acts = latent_acts(crosscoder, rows.acts, [latent])[:, 0].float().cpu()
    before_last = torch.tensor([len(window) - 2 for window in windows])
    fires = (rows.segment == before_last[rows.context]) & (feature_acts > 0)
    numbers = set(rows.context[fires].tolist())
    rows, here = rows_in(rows, [context for context in contexts if context.number in numbers])
    return rows, feature_acts[here]


def _rises(
    model: HookedModel, m: ModelName, rows: PairedRows, ablation: Edit
) -> Float[Tensor, " texts"]:
    if not rows.contexts:
        return torch.zeros(0)
    reading = reading_of(model, m, rows)
    acts = model.activations(reading.ids, reading.mask)
    texts = [context.segments for context in rows.contexts]
    ends = [(text.last_a if m == "a" else text.last_b)[-2:].tolist() for text in texts]
    positions = [torch.arange(start, stop) for start, stop in ends]
    lengths = torch.tensor([len(own) for own in positions])
    text, position = torch.arange(len(texts)).repeat_interleave(lengths), torch.cat(positions)

    def losses(x: Tensor) -> Tensor:
        found = logits_from(model, reading.ids, reading.mask, x, text, position).float()
        next_ids = reading.ids[text, position + 1].to(found.device)
        loss = cross_entropy(found, next_ids, reduction="none").cpu()
        return torch.zeros(len(texts)).index_add(0, text, loss)

    return losses(spliced(reading, ablation)(acts)) - losses(acts)
