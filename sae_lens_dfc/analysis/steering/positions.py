"""Selects positions of a prompt and its answer, and tracks which of them a forward pass with a
key-value cache reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_dfc.models.hooked_model import HookedModel

PositionKind = Literal["all", "prompt", "generated"]


class Positions(NamedTuple):
    """Selected positions of a batch of prompts, and whether the generated positions are selected
    too.

    >>> positions = Positions(torch.tensor([[False, True, True]]), generated=False)
    >>> positions.among(start=1, n=4)
    tensor([[ True,  True, False, False]])
    """

    prompt: Bool[Tensor, "_ n_prompt"]
    """One row per prompt, or one for all; includes the left padding of shorter prompts."""
    generated: bool
    """Whether the positions after the prompt are selected."""

    def among(self, start: int, n: int) -> Bool[Tensor, "_ n"]:
        """Which of the `n` positions from `start` on are selected."""
        inside = self.prompt[:, start : start + n]
        after = inside.new_full((len(inside), n - inside.shape[1]), self.generated)
        return torch.cat([inside, after], dim=1)


def positions_of(
    kind: PositionKind, prompts: Sequence[Sequence[int]], first: bool = True
) -> Positions:
    """Positions of the prompts (left-padded as in `generate.answer`), of the generated tokens, or
    of both.

    Args:
        kind: Which of these.
        prompts: Token ids of each prompt.
        first: Whether to include a prompt's first token. Crosscoders are trained without it.

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
    """Yield a function that returns how many positions the current pass has in its key-value cache,
    that is, how many come before those it reads.

    Read from the cache itself, so it holds for token-by-token and chunked passes, and for passes
    without a cache.

    Raises:
        ValueError: The model's hook comes before any module that receives the cache.
    """
    cached = 0

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        nonlocal cached
        cached = _n_cached(kwargs)

    # A torch hook, because TransformerLens' hooks see only activations, which carry no position.
    handle = _module_given_cache(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lambda: cached
    finally:
        handle.remove()


def _module_given_cache(model: HookedModel) -> nn.Module:
    """A module that receives the key-value cache before the model reaches its hook."""
    if isinstance(model.model, TransformerBridge):
        return model.model.original_model
    place, *rest = model.hook_name.split(".")
    if place == "blocks":
        return model.model.blocks[int(rest[0])]
    if place in ("ln_final", "unembed"):
        return model.model.blocks[-1]
    raise ValueError(
        f"Hook {model.hook_name!r} of HookedTransformer {model.name!r} comes before its first block, where it is unknown "
        "which positions are read. Steer all positions, or use model_class_name='TransformerBridge'."
    )


def _n_cached(kwargs: dict[str, Any]) -> int:
    entry = kwargs.get("past_kv_cache_entry")  # HookedTransformer's
    if entry is not None:
        return int(entry.past_keys.shape[1])
    cache = kwargs.get("past_key_values")  # transformers'
    if cache is not None:
        return int(cache.get_seq_length())
    place = kwargs.get("cache_position")  # for models with a state instead of a cache
    return 0 if place is None else int(place[0])
