"""Changing what a model computes at its hook, with hooks that leave when their block ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.models import HookedModel

Change = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
"""What to put in place of a model's activations at its hook; without heads' own axis, as everywhere here."""


@contextmanager
def changed(model: HookedModel, change: Change) -> Iterator[None]:
    """Every forward pass in the block goes on from `change(activations)`; only this hook is removed at its end.

    Args:
        model: The model; its `hook_name` is where it is changed.
        change: Gives the activations to go on with, from those that the model has there.
    """

    def hook_fn(acts: Tensor, hook: object) -> Tensor:  # noqa: ARG001
        # A hook on heads gives (batch, pos, head, d_head).
        return change(acts.flatten(start_dim=2)).to(acts.dtype).view(acts.shape)

    # By its canonical name: under an alias TransformerBridge's compatibility mode would call the hook twice.
    name = model.model.hook_dict[model.hook_name].name or model.hook_name
    with model.model.hooks(fwd_hooks=[(name, hook_fn)]):
        yield


@torch.no_grad()
def logits(
    model: HookedModel, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Next-token logits of a whole forward pass, with whatever hooks the model has now.

    Args:
        model: The model.
        ids: Token ids, padded on the right.
        mask: 1 for a token, 0 for padding.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.autocast):
        return model.model(
            ids.to(model.device), attention_mask=mask.to(model.device), return_type="logits"
        )
