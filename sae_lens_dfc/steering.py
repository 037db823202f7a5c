"""Changing what a model computes at its hook, with hooks that leave when their block ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.positions import Positions, cached_positions

Change = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
"""What to put in place of a model's activations at its hook; without heads' own axis, as everywhere here."""


@contextmanager
def changed(
    model: HookedModel, change: Change, positions: Positions | None = None
) -> Iterator[None]:
    """Every forward pass in the block goes on from `change(activations)`; only this hook is removed at its end.

    Args:
        model: The model; its `hook_name` is where it is changed.
        change: Gives the activations to go on with, from those that the model has there.
        positions: Where activations are changed, in `generate` with a key-value cache too; the others stay as they are,
            bit by bit. None is everywhere.

    Raises:
        ValueError: The model's hook comes before what could tell positions; in the block: `positions` are of other prompts.
    """
    if positions is None:
        with _hooked(model, change):
            yield
        return
    with cached_positions(model) as n_cached:

        def change_there(acts: Tensor) -> Tensor:
            there = positions.among(n_cached(), acts.shape[1]).to(acts.device)
            if len(there) not in (1, len(acts)):
                raise ValueError(
                    f"Positions of {len(there)} prompts cannot be those of {len(acts)}. Give one row for each, or one for all."
                )
            if not there.any():
                return acts
            return torch.where(there.unsqueeze(-1), change(acts).to(acts.dtype), acts)

        with _hooked(model, change_there):
            yield


@contextmanager
def _hooked(model: HookedModel, change: Change) -> Iterator[None]:
    def hook_fn(acts: Tensor, hook: object) -> Tensor:  # noqa: ARG001
        # A hook on heads gives (batch, pos, head, d_head).
        return change(acts.flatten(start_dim=2)).to(acts.dtype).view(acts.shape)

    # By its canonical name: under an alias TransformerBridge's compatibility mode would call the hook twice.
    name = model.model.hook_dict[model.hook_name].name or model.hook_name
    with model.model.hooks(fwd_hooks=[(name, hook_fn)]):
        yield


def added(vectors: Float[Tensor, "*batch d_model"]) -> Change:
    """Add a direction to the activations at every token position, as in arXiv 2602.11729, appendix B.4.3.

    A vector of zeros changes no bit of what the model computes.

    Args:
        vectors: One vector for all texts, or one for each text of a batch.

    >>> change = added(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    >>> change(torch.ones(2, 3, 2))[:, 0]
    tensor([[1., 1.],
            [2., 0.]])
    """
    return lambda acts: acts + vectors.to(acts.device).unsqueeze(-2)


@torch.no_grad()
def logits(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "batch _ d_vocab"]:
    """Next-token logits of a whole forward pass, with whatever hooks the model has now.

    Args:
        model: The model.
        ids: Token ids, padded on the right.
        mask: 1 for a token, 0 for padding.
        positions: Positions whose logits are wanted; the others' are not computed. None gives all.
    """
    # By a hook, since TransformerLens' two classes have no argument for it in common.
    kept = nullcontext()
    if positions is not None:
        where = list(positions)
        kept = model.model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, where])])  # noqa: ARG005
    with kept, torch.autocast(model.device.type, torch.bfloat16, enabled=model.autocast):
        return model.model(
            ids.to(model.device), attention_mask=mask.to(model.device), return_type="logits"
        )


@torch.no_grad()
def logits_at_end(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    acts: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the token after each text, when the model goes on from `acts` at its hook.

    Args:
        model: The model.
        ids: Token ids, padded on the right.
        mask: 1 for a token, 0 for padding.
        acts: What stands at the hook at every position.
    """
    last = mask.sum(dim=1) - 1
    kept = range(int(last.min()), int(last.max()) + 1)
    with _lower_blocks_left_out(model), changed(model, lambda x: acts.to(x)):
        found = logits(model, ids, mask, kept)
    return found[torch.arange(len(last)), last - kept.start]


class _PassThrough(nn.Module):
    @override
    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states


@contextmanager
def _lower_blocks_left_out(model: HookedModel) -> Iterator[None]:
    # What they compute is replaced at the hook, if that is a block's output; it is half of the time.
    kind, _, rest = model.hook_name.partition(".")
    layer, _, point = rest.partition(".")
    n_left_out = int(layer) if kind == "blocks" and point == "hook_resid_post" else 0
    blocks: Any = model.model.blocks
    lower = list(blocks[:n_left_out])
    try:
        for i in range(n_left_out):
            blocks[i] = _PassThrough()
        yield
    finally:
        for i, block in enumerate(lower):
            blocks[i] = block
