"""Refuses models for which TransformerLens and transformers compute different logits, and lists
those that generate wrongly in some modes."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

WHAT_TO_DO = 'Give another; the docs\' page "Which models?" lists those that work.'
PROBE_TOKENS = 8
"""Number of tokens in the check: enough to detect wrong positions, and tokens that attend to later
ones."""
MAX_DIFFERENCE = 1e-3
"""Maximum difference between two computations of the same logits, as a share of their size; for
most architectures it is 0."""
MAX_DIFFERENCE_IN_HALF = 0.2
"""The same in 16-bit dtypes, where rounding errors add up; wrong logits differ by about their whole
size."""

ONE_AT_A_TIME = frozenset(
    {
        "FalconMambaForCausalLM",
        "GlmMoeDsaForCausalLM",
        "MambaForCausalLM",
        "RecurrentGemmaForCausalLM",
    }
)
"""Architectures whose output changes with left padding, in TransformerLens or in transformers
itself."""
WITHOUT_KV_CACHE = frozenset({"MptForCausalLM"})
"""Architectures for which TransformerLens counts positions wrongly when it generates with a
key-value cache."""
WITHOUT_ITS_OWN_STATE = frozenset({"BambaForCausalLM", "OlmoHybridForCausalLM"})
"""Architectures for which TransformerLens creates a recurrent state that these versions of
transformers cannot continue from; transformers' own state works."""


class UnsupportedModelError(ValueError):
    """TransformerLens cannot run a model, or would run it wrongly; the message is complete and
    needs no prefix."""


def check_architecture(name: str, hf_model: PreTrainedModel) -> None:
    """Refuse a model that TransformerBridge does not support.

    Raises:
        UnsupportedModelError: TransformerBridge does not support its architecture.
    """
    kind = type(hf_model).__name__
    if kind not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"Model {name!r} is a {kind}, which TransformerLens cannot run. {WHAT_TO_DO}"
        )


def check_blocks(name: str, hf_model: PreTrainedModel, bridge: TransformerBridge) -> None:
    """Refuse a model that is not a single stack of blocks, each of which reads the output of the
    one before.

    Raises:
        UnsupportedModelError: The model is not a single stack of blocks.
    """
    if not hasattr(bridge, "blocks"):
        raise UnsupportedModelError(
            f"Model {name!r} is a {type(hf_model).__name__}, which is not one stack of blocks, so there is no middle of it "
            f"to read. {WHAT_TO_DO}"
        )


class Computed(NamedTuple):
    """A few tokens, and the logits that transformers computes for them."""

    ids: Int[Tensor, "1 pos"]
    logits: Float[Tensor, "1 pos d_vocab"]


@torch.no_grad()
def computed(hf_model: PreTrainedModel) -> Computed:
    """Run a few tokens through the transformers model, before TransformerLens replaces its
    modules."""
    ids = (torch.arange(PROBE_TOKENS) % hf_model.config.get_text_config().vocab_size)[None]
    ids = ids.to(hf_model.device)
    return Computed(ids, hf_model(input_ids=ids).logits)


def logit_difference(found: Tensor, expected: Tensor) -> float:
    """Distance between two tensors, relative to the norm of the second.

    >>> logit_difference(torch.tensor([3.0, 6.5]), torch.tensor([3.0, 4.0]))
    0.5
    """
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def check_logits(name: str, model: nn.Module, expected: Computed) -> None:
    """Refuse a model for which TransformerLens and transformers compute different logits.

    TransformerLens reimplements the attention of most architectures, and gets the positions or the
    mask of some wrong. Its activations are then not the model's, and no later step could detect
    this.

    Args:
        name: What to call the model.
        model: TransformerLens' model.
        expected: The tokens, and the logits that transformers computes.

    Raises:
        UnsupportedModelError: The logits differ by more than rounding.
    """
    ids, logits = expected
    found = model(ids, attention_mask=torch.ones_like(ids), return_type="logits")
    share = logit_difference(found, logits)
    is_half = logits.dtype in (torch.float16, torch.bfloat16)
    # False for NaN: overflows are counted and reported when activations are read.
    if share > (MAX_DIFFERENCE_IN_HALF if is_half else MAX_DIFFERENCE):
        raise UnsupportedModelError(
            f"TransformerLens does not compute what model {name!r} computes in transformers: their logits differ by "
            f"{share:.1%}. Its activations would be wrong. {WHAT_TO_DO}"
        )
