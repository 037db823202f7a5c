"""Changes a model's activations at its hook within a context manager, which removes the hook at the
end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_dfc.analysis.steering.positions import Positions, cached_positions
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.opening.supported import MAX_DIFFERENCE, logit_difference

Change = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
"""Maps a model's activations at its hook to their replacement; heads are flattened, as everywhere
here."""


@contextmanager
def changed(
    model: HookedModel, change: Change, positions: Positions | None = None
) -> Iterator[None]:
    """Within the block, every forward pass continues from `change(activations)`; afterwards only
    this hook is removed.

    Args:
        model: The model, changed at its `hook_name`.
        change: Maps the model's activations to their replacement.
        positions: Positions to change, including in `generate` with a key-value cache; all others
            stay bit-identical. None changes all positions.

    Raises:
        ValueError: The hook comes before any module that receives the key-value cache; or, within
            the block, `positions` has another number of prompts than the batch.
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

    # Use the canonical name: under an alias, TransformerBridge's compatibility mode calls the hook
    # twice.
    name = model.model.hook_dict[model.hook_name].name or model.hook_name
    with model.model.hooks(fwd_hooks=[(name, hook_fn)]):
        yield


def added(vectors: Float[Tensor, "*batch d_model"]) -> Change:
    """Add a direction to the activations at every token position, as in arXiv 2602.11729, appendix
    B.4.3.

    A zero vector leaves the model's output bit-identical.

    Args:
        vectors: One vector for all texts, or one per text of a batch.

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
    """Next-token logits of a forward pass, with the hooks currently on the model.

    Args:
        model: The model.
        ids: Token ids, padded on the right.
        mask: 1 for a token, 0 for padding.
        positions: Positions at which to compute logits. None computes all.
    """
    # Selected with a hook, because TransformerLens' two classes share no argument for it.
    kept = nullcontext()
    if positions is not None:
        where = list(positions)
        kept = model.model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, where])])  # noqa: ARG005
    with kept:
        return _predicted(model, ids, mask)


def _predicted(model: HookedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.autocast):
        return model.model(
            ids.to(model.device), attention_mask=mask.to(model.device), return_type="logits"
        )


def logits_from(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    acts: Float[Tensor, "batch pos d_model"],
    text: Int[Tensor, " n"],
    position: Int[Tensor, " n"],
) -> Float[Tensor, "n d_vocab"]:
    """Next-token logits at some positions of some texts, with the activations at the hook replaced.

    Args:
        model: The model.
        ids: Token ids, padded on the right.
        mask: 1 for a token, 0 for padding.
        acts: Activations to place at the hook, at every position.
        text: Text of each position, from 0.
        position: Position in its text.
    """
    # Of a large vocabulary, only the wanted logits are computed.
    kept = model.model.hooks(
        fwd_hooks=[("unembed.hook_in", lambda x, hook: x[text, position][:, None])]  # noqa: ARG005
    )
    with _lower_blocks_left_out(model), changed(model, lambda x: acts.to(x)), kept:
        return _predicted(model, ids, mask)[:, 0]


@torch.no_grad()
def logits_at_end(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    acts: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the token after each text; see `logits_from`."""
    return logits_from(model, ids, mask, acts, torch.arange(len(ids)), mask.sum(dim=1) - 1)


class _PassThrough(nn.Module):
    @override
    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states


_GOES_ON: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""Per model and number of lower blocks: whether skipping them leaves the output unchanged."""


@contextmanager
def _lower_blocks_left_out(model: HookedModel) -> Iterator[None]:
    # If the hook is a block's output, the output of the blocks below is replaced anyway; skipping
    # them halves the time.
    kind, _, rest = model.hook_name.partition(".")
    layer, _, point = rest.partition(".")
    n = int(layer) if kind == "blocks" and point == "hook_resid_post" else 0
    known = _GOES_ON.setdefault(model.model, {0: False})
    if n not in known:
        known[n] = _goes_on_without(model, n)
    with _left_out(model, n if known[n] else 0):
        yield


def _goes_on_without(model: HookedModel, n_blocks: int) -> bool:
    # Some blocks return more than activations (shared keys, a state), and some models inspect the
    # type of their blocks.
    ids = torch.tensor([[0, 1, 2]])
    mask = torch.ones_like(ids)
    acts = model.activations(ids, mask)
    with changed(model, lambda x: acts.to(x)):
        whole = logits(model, ids, mask)
        try:
            with _left_out(model, n_blocks):
                return logit_difference(logits(model, ids, mask), whole) < MAX_DIFFERENCE
        except Exception:
            return False  # they are then computed, as they would be without this shortcut


@contextmanager
def _left_out(model: HookedModel, n_blocks: int) -> Iterator[None]:
    blocks: Any = model.model.blocks
    lower = list(blocks[:n_blocks])
    try:
        for i in range(n_blocks):
            blocks[i] = _PassThrough()
        yield
    finally:
        for i, block in enumerate(lower):
            blocks[i] = block
