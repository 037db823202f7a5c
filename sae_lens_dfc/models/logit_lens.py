"""Computes the direct logit effects of directions in the residual stream (logit lens), through the
final norm and the unembedding."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.models.decoding import text_of
from sae_lens_dfc.models.hooked_model import HookedModel

DIRECTIONS_AT_ONCE = 64
# TransformerLens' residual stream hooks, and TransformerBridge's hooks at the input and output of a
# block.
RESIDUAL_STREAM = re.compile(r"hook_resid_(pre|mid|post)$|^blocks\.\d+\.hook_(in|out)$")
_PROBE_SIZE = 1000.0


class FinalNorm(NamedTuple):
    """The final norm of a model, without the division by the size of the residual stream."""

    weight: Float[Tensor, " d_model"]
    is_centered: bool
    """Whether the mean over dimensions is subtracted first, as in LayerNorm but not in RMSNorm."""


def has_direct_effect(model: HookedModel) -> bool:
    """Whether the hook is in the residual stream and the unembedding is in memory
    (`drop_unused_layers` frees it)."""
    is_whole = all(p.numel() > 0 for p in model.model.unembed.parameters())
    # Several parallel residual streams are mixed before the unembedding.
    is_one_stream = model.d_model == model.model.cfg.d_model
    return is_whole and is_one_stream and RESIDUAL_STREAM.search(model.hook_name) is not None


@torch.no_grad()
def final_norm(model: HookedModel) -> FinalNorm:
    """The weight of the model's final norm, measured by running the norm; 1 if there is no norm.

    HookedTransformer and TransformerBridge store it in different places and forms (Gemma's is 1 + w
    in one and w in the other, and 1 if folded into the unembedding), but all compute `weight *
    normed(x) + bias`.
    """
    d_model = model.model.cfg.d_model
    norm = getattr(model.model, "ln_final", None)
    if norm is None:
        return FinalNorm(torch.ones(d_model, device=model.device), is_centered=False)
    # Large, so that the norm's epsilon is negligible; of both signs, so that its bias cancels.
    ones = torch.full((d_model,), _PROBE_SIZE)
    signs = ones.where(torch.arange(d_model) % 2 == 0, -ones)
    probes = torch.stack([ones, -ones, signs, -signs])[:, None]
    W_U = model.model.W_U
    of_ones, minus_ones, of_signs, minus_signs = norm(probes.to(W_U)).float()[:, 0]
    rest = (of_ones - minus_ones).norm()
    is_centered = bool(rest < 0.01 * (of_signs - minus_signs).norm())
    x = signs - signs.mean() if is_centered else signs
    normed = x / x.pow(2).mean().sqrt()
    return FinalNorm((of_signs - minus_signs) / (2 * normed.to(of_signs)), is_centered)


@torch.no_grad()
def direct_logit_effects(
    model: HookedModel, directions: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """`(d * w) @ W_U` for each unit-norm direction `d`, minus its mean over the vocabulary.

    `w` is the weight of the final norm; for a LayerNorm, the direction's own mean is subtracted
    first, as the norm does. The norm also divides by the size of the residual stream, which depends
    on the rest of the text, and Gemma 2 caps its logits: neither changes the order of the tokens,
    and both are left out. So a value is in logits times the size (root mean square) of the residual
    stream, and compares tokens and latents within one model, not across models. (nostalgebraist
    2020, "interpreting GPT: the logit lens"; Bloom & Lin 2024, "Understanding SAE features with the
    logit lens".)

    Args:
        model: A model whose hook is in the residual stream; see `has_direct_effect`.
        directions: Directions in raw activation space; zero directions give zeros.

    Raises:
        ValueError: `has_direct_effect` is false for the model.
    """
    if not has_direct_effect(model):
        raise ValueError(
            f"Model {model.name!r} has no direct logit effect at {model.hook_name!r}: that is not its residual stream, or "
            "drop_unused_layers has freed its unembedding. Read it at a hook_resid_post and keep its layers."
        )
    norm, W_U = final_norm(model), model.model.W_U.float()
    d = directions.to(W_U)
    if norm.is_centered:
        # Before normalizing, because LayerNorm removes the component along the mean.
        d = d - d.mean(dim=-1, keepdim=True)
    d = torch.nn.functional.normalize(d, dim=-1)
    logits = (d * norm.weight.to(d)) @ W_U[:, : n_tokens(model)]
    return logits - logits.mean(dim=-1, keepdim=True)


def n_tokens(model: HookedModel) -> int:
    """Number of tokens that both the model and the tokenizer have; many models pad the vocabulary
    to a round number."""
    return min(len(model.tokenizer), int(model.model.cfg.d_vocab))


Ranked = list[tuple[str, float]]
"""Token texts with a direction's effect on their logits, strongest first."""


def extreme_tokens(
    model: HookedModel, directions: Float[Tensor, "n d_model"], n: int = 10
) -> Iterator[tuple[Ranked, Ranked]]:
    """For each direction, the `n` tokens that it promotes most and the `n` that it suppresses most,
    with their effects.

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
