"""Checks that a model can be paired: it reads text from left to right, and has embeddings for its
tokenizer's tokens."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

PROBES = 2
"""Number of probes that test whether a model reads ahead; rounding alone does not change the
activations of both by much."""
TOKENS_COMPARED = 4
"""Tokens at the beginning of a probe that both rows of a pair share."""
LATER = 4
"""Maximum number of tokens after the shared ones."""


# --- reading order ---


def check_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse a model if its transformers configuration says that it is not a decoder that reads
    from left to right.

    Args:
        config: The model's configuration.
        name: What to call the model.

    Raises:
        ValueError: The model is an encoder, an encoder with a decoder, or reads in both directions.
    """
    if why := _not_causal(config):
        raise ValueError(
            f"Model {name!r} ({config.model_type}) {why}. Positions are paired where both models have read the same text, so "
            "give a decoder that reads from left to right (such as GPT-2, Llama or Mamba)."
        )


def _not_causal(config: PretrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder with a decoder, and its decoder reads another text than its encoder"
    text: Any = config.get_text_config(decoder=True)
    # Gemma's value "vision" applies to image tokens only; XLNet's attention is always "bi".
    is_bidirectional = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    is_bidirectional |= getattr(text, "attn_type", None) == "bi"
    # XLM marks a decoder with `causal`, other architectures that can be either with `is_decoder`.
    is_decoder = getattr(text, "is_decoder", False) or getattr(text, "causal", False)
    is_encoder = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    if is_bidirectional or is_encoder or getattr(text, "is_causal", None) is False:
        return "reads a text in both directions: its activations at a word depend on the words after it"
    return None


def probe(n_embeddings: int, n_ctx: int) -> Int[Tensor, "rows pos"]:
    """Make rows of tokens in pairs: both rows of a pair begin with the same tokens and continue
    with different ones.

    Args:
        n_embeddings: Number of tokens that the model has embeddings for.
        n_ctx: Maximum number of tokens that the model can read.

    >>> probe(50, n_ctx=3).tolist()
    [[13, 32, 1], [13, 32, 26], [20, 39, 8], [20, 39, 33]]
    """
    n = min(TOKENS_COMPARED + LATER, n_ctx)
    rows: list[Tensor] = []
    for i in range(PROBES):
        ids = (torch.arange(i * n, (i + 1) * n) * 7919 + 13) % n_embeddings
        other = ids.clone()
        other[_n_shared(n) :] = (ids[_n_shared(n) :] + n_embeddings // 2) % n_embeddings
        rows += [ids, other]
    return torch.stack(rows)


def _n_shared(n: int) -> int:
    return min(TOKENS_COMPARED, n - 1)


def check_reads_in_order(
    acts: Float[Tensor, "rows pos d_model"], eps: float, hook_name: str, name: str
) -> None:
    """Refuse a model whose activations at a token depend on later tokens.

    In some models that read in order, different later tokens still change the rounding of the
    earlier ones: the experts that the later tokens choose decide how the earlier ones are computed.
    So a model is refused only if, in every pair of rows, the activations of some shared token
    change by more than half of the dtype's digits. Over models of all kinds with untrained weights
    in float32, models that read in order changed by 2e-7 at most, and the others by 2e-3 at least.

    Args:
        acts: The model's activations at the hook, for the rows of `probe`.
        eps: Machine epsilon of the coarsest dtype that the model uses.
        hook_name: The hook at which they were read.
        name: What to call the model.

    Raises:
        ValueError: The activations depend on later tokens.
    """
    n_shared = _n_shared(acts.shape[1])
    one, other = acts[0::2, :n_shared].float(), acts[1::2, :n_shared].float()
    # 0 / 0 for a token whose activations are all zero.
    moved = ((one - other).norm(dim=-1) / one.norm(dim=-1)).nan_to_num(nan=0).amax(dim=-1)
    if bool((moved > eps**0.5).all()):
        raise ValueError(
            f"Model {name!r} reads ahead: at hook {hook_name!r} the activations of a token move by {moved.min():.1%} when only tokens "
            "after it change. Positions are paired where both models have read the same text, so give a decoder that reads from left to "
            "right."
        )


# --- vocabulary ---


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, n_embeddings: int, name: str) -> None:
    """Refuse a tokenizer that can turn text into tokens for which the model has no embedding.

    Special tokens may have no embedding: fine-tunes and TransformerLens add a padding token that is
    never read. `HookedModel.check_ids` refuses any text that contains such a token.

    Args:
        tokenizer: The model's tokenizer.
        n_embeddings: Number of tokens that the model has embeddings for.
        name: What to call the model.

    Raises:
        ValueError: Such a token exists; the message gives the number of tokens and the number of
            embeddings.
    """
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    missing = [
        (i, token)
        for token, i in tokenizer.get_vocab().items()
        if i >= n_embeddings and i not in special
    ]
    if missing:
        number, token = min(missing)
        raise ValueError(
            f"The tokenizer of model {name!r} has {max(missing)[0] + 1} tokens, and the model has embeddings for "
            f"{n_embeddings}: {token!r} is number {number}. Give the model with the tokenizer that it was trained with, or resize its "
            "embeddings (resize_token_embeddings) and train them."
        )
