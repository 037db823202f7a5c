"""What a direction at a model's hook says of the next token, if nothing but the final norm and the unembedding reads it."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.tokens import text_of

DIRECTIONS_AT_ONCE = 64
# TransformerLens' names of a residual stream, and TransformerBridge's own for its ends in a block.
RESIDUAL_STREAM = re.compile(r"hook_resid_(pre|mid|post)$|^blocks\.\d+\.hook_(in|out)$")
_PROBE_SIZE = 1000.0


class FinalNorm(NamedTuple):
    """What a model does to its last residual stream before the unembedding, but for the division by its size."""

    weight: Float[Tensor, " d_model"]
    is_centred: bool
    """Whether the mean over the dimensions is taken off first, as in LayerNorm and not in RMSNorm."""


def has_direct_effect(model: HookedModel) -> bool:
    """Whether the model is read in its residual stream and its unembedding is in memory (`drop_unused_layers` frees it)."""
    is_whole = all(p.numel() > 0 for p in model.model.unembed.parameters())
    return is_whole and RESIDUAL_STREAM.search(model.hook_name) is not None


@torch.no_grad()
def final_norm(model: HookedModel) -> FinalNorm:
    """The weight of the model's final norm, found by what it does: 1 for a model that has none.

    HookedTransformer and TransformerBridge keep it in different places and forms (Gemma's is 1 + w in one and w in the other,
    and folded into the unembedding it is 1), but all compute `weight * normed(x) + bias`.
    """
    d_model = model.model.cfg.d_model
    norm = getattr(model.model, "ln_final", None)
    if norm is None:
        return FinalNorm(torch.ones(d_model, device=model.device), is_centred=False)
    # Large, so that the norm's epsilon does not count; of both signs, so that its bias cancels.
    ones = torch.full((d_model,), _PROBE_SIZE)
    signs = ones.where(torch.arange(d_model) % 2 == 0, -ones)
    probes = torch.stack([ones, -ones, signs, -signs])[:, None]
    W_U = model.model.W_U
    of_ones, minus_ones, of_signs, minus_signs = norm(probes.to(W_U)).float()[:, 0]
    rest = (of_ones - minus_ones).norm()
    is_centred = bool(rest < 0.01 * (of_signs - minus_signs).norm())
    x = signs - signs.mean() if is_centred else signs
    normed = x / x.pow(2).mean().sqrt()
    return FinalNorm((of_signs - minus_signs) / (2 * normed.to(of_signs)), is_centred)


@torch.no_grad()
def direct_logit_effects(
    model: HookedModel, directions: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """`(d * w) @ W_U` of each direction at unit length, less its mean over the vocabulary.

    `w` is the weight of the final norm; of a LayerNorm the direction's own mean is taken off first, as it does. The norm also
    divides by the size of the residual stream, which the rest of the text decides, and Gemma 2 caps its logits: neither
    changes the order of the tokens and both are left out. So a value is in logits times the size (root mean square) of the
    residual stream; it serves to compare tokens and latents of one model, not two models.
    (nostalgebraist 2020, "interpreting GPT: the logit lens"; Bloom & Lin 2024, "Understanding SAE features with the logit
    lens".)

    Args:
        model: A model that is read in its residual stream; see `has_direct_effect`.
        directions: In raw units of its activations; zeros give zeros.

    Raises:
        ValueError: The model has no direct effect.
    """
    if not has_direct_effect(model):
        raise ValueError(
            f"Model {model.name!r} has no direct logit effect at {model.hook_name!r}: that is not its residual stream, or "
            "drop_unused_layers has freed its unembedding. Read it at a hook_resid_post and keep its layers."
        )
    norm, W_U = final_norm(model), model.model.W_U.float()
    d = directions.to(W_U)
    if norm.is_centred:
        # Before its length is taken: along the mean there is nothing that LayerNorm lets through.
        d = d - d.mean(dim=-1, keepdim=True)
    d = torch.nn.functional.normalize(d, dim=-1)
    logits = (d * norm.weight.to(d)) @ W_U[:, : n_tokens(model)]
    return logits - logits.mean(dim=-1, keepdim=True)


def n_tokens(model: HookedModel) -> int:
    """Tokens that the model can say and the tokenizer can spell: many vocabularies are padded to a round number."""
    return min(len(model.tokenizer), int(model.model.cfg.d_vocab))


Ranked = list[tuple[str, float]]
"""Tokens' texts with a direction's effect on their logits, the largest effect first."""


def extreme_tokens(
    model: HookedModel, directions: Float[Tensor, "n d_model"], n: int = 10
) -> Iterator[tuple[Ranked, Ranked]]:
    """Of each direction the `n` tokens that it promotes and the `n` that it suppresses most, with their effects.

    See `direct_logit_effects`, which is computed for 64 directions at a time.
    """
    n = min(n, n_tokens(model))
    texts: dict[int, str] = {}

    def ranked(ids: Tensor, values: Tensor) -> Ranked:
        for i in set(ids.tolist()) - set(texts):
            texts[i] = text_of(model.tokenizer, i)
        return [(texts[i], v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    for part in directions.split(DIRECTIONS_AT_ONCE):
        effects = direct_logit_effects(model, part)
        top, bottom = effects.topk(n, dim=-1), effects.topk(n, dim=-1, largest=False)
        for i in range(len(part)):
            yield (
                ranked(top.indices[i], top.values[i]),
                ranked(bottom.indices[i], bottom.values[i]),
            )
