"""Which tokens of a prompt and of its answer are meant, and which of them a forward pass reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_dfc.models import HookedModel

Kind = Literal["all", "prompt", "generated"]


class Positions(NamedTuple):
    """Some positions of the prompts of a batch, and whether those generated after them belong to them.

    >>> positions = Positions(torch.tensor([[False, True, True]]), generated=False)
    >>> positions.among(start=1, n=4)
    tensor([[ True,  True, False, False]])
    """

    prompt: Bool[Tensor, "_ n_prompt"]
    """A row for each prompt, or one for all; with the padding that stands before shorter prompts."""
    generated: bool
    """Whether the positions after the prompt are meant."""

    def among(self, start: int, n: int) -> Bool[Tensor, "_ n"]:
        """Which of the `n` positions from `start` on are meant."""
        inside = self.prompt[:, start : start + n]
        after = inside.new_full((len(inside), n - inside.shape[1]), self.generated)
        return torch.cat([inside, after], dim=1)


def positions_of(kind: Kind, prompts: Sequence[Sequence[int]], first: bool = True) -> Positions:
    """The positions of prompts, padded on the left as `generate.answer` pads them, of what is generated, or of both.

    Args:
        kind: Which.
        prompts: Token ids of each prompt.
        first: Whether the first token of a prompt belongs to it. Crosscoders are trained without it.

    >>> positions_of("prompt", [[5, 6, 7], [8, 9]], first=False).prompt
    tensor([[False,  True,  True],
            [False, False,  True]])
    """
    longest = max(map(len, prompts))
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    if kind != "generated":
        for row, prompt in zip(mask, prompts, strict=True):
            row[longest - len(prompt) + (not first) :] = True
    return Positions(mask, kind != "prompt")


@contextmanager
def cached_positions(model: HookedModel) -> Iterator[Callable[[], int]]:
    """Gives how many positions the pass under way has in its key-value cache: how many come before those it reads.

    Asked of the cache itself, so it holds for passes one after another, token by token, in pieces, or without a cache.

    Raises:
        ValueError: The model's hook comes before what could tell.
    """
    cached = 0

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        nonlocal cached
        cached = _n_cached(kwargs)

    # By torch's own hook: TransformerLens' hooks see activations alone, and no activation says where it stands.
    handle = _told_of_cache(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lambda: cached
    finally:
        handle.remove()


def _told_of_cache(model: HookedModel) -> nn.Module:
    """The module that is called with the key-value cache, before the model comes to its hook."""
    if isinstance(model.model, TransformerBridge):
        return model.model.original_model
    place, *rest = model.hook_name.split(".")
    if place == "blocks":
        return model.model.blocks[int(rest[0])]
    if place in ("ln_final", "unembed"):
        return model.model.blocks[-1]
    raise ValueError(
        f"Hook {model.hook_name!r} of HookedTransformer {model.name!r} comes before its first block, where nothing says "
        "which positions are read. Steer all positions, or use model_class_name='TransformerBridge'."
    )


def _n_cached(kwargs: dict[str, Any]) -> int:
    entry = kwargs.get("past_kv_cache_entry")  # HookedTransformer's
    if entry is not None:
        return int(entry.past_keys.shape[1])
    cache = kwargs.get("past_key_values")  # transformers'
    if cache is not None:
        return int(cache.get_seq_length())
    place = kwargs.get("cache_position")  # of models with a state in place of a cache
    return 0 if place is None else int(place[0])
