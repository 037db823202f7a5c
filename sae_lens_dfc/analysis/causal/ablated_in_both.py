"""Ablates a latent in both models, and measures how much each model's loss on the text that follows
changes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sae_lens_dfc.analysis.causal.activation_patching import Texts
from sae_lens_dfc.analysis.steering.hooks import logits_from
from sae_lens_dfc.analysis.steering.splicing import Edit, spliced
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName


class LossRises(NamedTuple):
    """Rise of a model's loss on the text after a firing by an ablation, in nats, for each text."""

    latent: Float[Tensor, " texts"]
    controls: Float[Tensor, "controls texts"]


@torch.no_grad()
def ablated_in_both(
    crosscoder: Crosscoder,
    pair: ModelPair,
    latent: int,
    texts: Texts,
    controls: Sequence[int],
) -> dict[ModelName, LossRises]:
    """Ablate a shared latent in both models, each with its own decoder, and measure what it costs
    them. No map between the models is needed.

    With `f` the latent's activation, `x_m - f d_m` replaces model m's activation at every paired
    position. The loss is measured on each text's last segment, between the firing and the next
    pair. Both models predict the same characters there, so the rises are comparable whatever the
    tokenizers. A control is another latent's decoder in each model, with the norm of `d_m` and the
    same `f`: a model that predicts well can mostly only lose by a change of its activations, one
    that predicts badly can gain too.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole: not with `drop_unused_layers`.
        latent: A latent of the shared partition.
        texts: Texts of `texts_of` with `n_after=1`: each goes one segment beyond a firing.
        controls: Other shared latents.

    Returns:
        For each model (`a`, `b`) its rises, on the texts on which all are finite.
    """
    rises: dict[ModelName, Tensor] = {}
    for m in pair.models:
        decoders = crosscoder.W_dec[[latent, *controls], crosscoder.partition.models[m]].float()
        directions = normalize(decoders) * decoders[0].norm()
        before = _losses(pair, texts, m, None)
        rises[m] = torch.stack([_losses(pair, texts, m, own) - before for own in directions])
    known = torch.cat(list(rises.values())).isfinite().all(dim=0)
    return {m: LossRises(found[0, known], found[1:, known]) for m, found in rises.items()}


def _losses(
    pair: ModelPair, texts: Texts, m: ModelName, direction: Tensor | None
) -> Float[Tensor, " texts"]:
    """The model's loss on each text's last segment, with a direction ablated."""
    reading, acts = texts.readings[m], texts.acts[m]
    if direction is not None:
        change = -texts.feature_acts.to(acts)[:, None] * direction.to(acts)
        acts = spliced(reading, Edit(change, adds=True))(acts)
    segments = [context.segments for context in texts.rows.contexts]
    ends = [(own.last_a if m == "a" else own.last_b)[-2:].tolist() for own in segments]
    # A position predicts the token after it.
    positions = [torch.arange(start, stop) for start, stop in ends]
    lengths = torch.tensor([len(own) for own in positions])
    text, position = torch.arange(len(ends)).repeat_interleave(lengths), torch.cat(positions)
    found = logits_from(pair.models[m], reading.ids, reading.mask, acts, text, position).float()
    next_ids = reading.ids[text, position + 1].to(found.device)
    loss = cross_entropy(found, next_ids, reduction="none").cpu()
    return torch.zeros(len(ends)).index_add(0, text, loss)
