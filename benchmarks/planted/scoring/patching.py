"""Measures how changed activations affect a model's preference for the planted behavior, without
generating text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.steering.hooks import logits_at_end
from sae_lens_dfc.data.activations import after_first_position
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.pair import ModelPair, padded
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.organisms.behaviors import Item


class PatchedReading(NamedTuple):
    """One model's tokens and activations on prompts, right-padded."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    acts: Float[Tensor, "batch pos d_model"]
    """Activations at the model's hook."""
    answers: Int[Tensor, "batch 2"]
    """First token of the behavior's answer and of the ordinary answer. Later tokens follow from it,
    so they are not scored."""


@dataclass(frozen=True)
class Prepared:
    """Prompts read by both models."""

    a: PatchedReading
    b: PatchedReading
    rows: Float[Tensor, "n d_in"]
    """Both models' activations at all paired positions except first tokens, prompt by prompt."""
    text: Int[Tensor, " n"]
    """Prompt index of each row."""
    position_b: Int[Tensor, " n"]
    """Position of each row in model B."""

    @property
    def n_items(self) -> int:
        """Number of prompts."""
        return len(self.b.ids)


@torch.no_grad()
def prepared(pair: ModelPair, items: Sequence[Item]) -> Prepared:
    """Run both models over the prompts.

    Raises:
        ValueError: A prompt's tokens change when an answer follows.
    """
    contexts = [pair.segments(item.prompt)[0].after(pair.bos_segment) for item in items]
    a = _reading(pair.a, [c.ids_a for c in contexts], items)
    b = _reading(pair.b, [c.ids_b for c in contexts], items)
    where = [after_first_position(context).nonzero()[:, 0] for context in contexts]
    text = torch.cat([torch.full((len(w),), i) for i, w in enumerate(where)])
    position_a, position_b = (
        torch.cat([torch.from_numpy(last)[w] for last, w in zip(lasts, where, strict=True)])
        for lasts in ([c.last_a for c in contexts], [c.last_b for c in contexts])
    )
    rows = torch.cat([a.acts[text, position_a], b.acts[text, position_b]], dim=-1)
    return Prepared(a, b, rows, text, position_b)


def _reading(
    model: HookedModel, rows: Sequence[Int[np.ndarray, " _"]], items: Sequence[Item]
) -> PatchedReading:
    ids, mask = padded(model, rows)
    answers = [
        [first_token(model.tokenizer, item.prompt, way) for way in (item.answer, item.ordinary)]
        for item in items
    ]
    acts = model.activations(ids, mask).float()
    return PatchedReading(ids, mask, acts, torch.tensor(answers))


def first_token(tokenizer: Any, prompt: str, answer: str) -> int:
    """The first token of an answer after a prompt.

    Raises:
        ValueError: The prompt's tokens change when the answer follows.
    """
    alone, both = (list(tokenize(tokenizer, text).ids) for text in (prompt, prompt + answer))
    if both[: len(alone)] != alone or len(both) == len(alone):
        raise ValueError(
            f"The answer {answer!r} does not start with a separate token after the prompt {prompt!r}."
        )
    return int(both[len(alone)])


@torch.no_grad()
def preferences(
    model: HookedModel, reading: PatchedReading, acts: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " n_items"]:
    """The model's preference for the behavior's over the ordinary answer on each prompt, with the
    activations at its hook replaced by `acts`.

    Log-probability of the behavior's first token minus that of the ordinary answer's, in nats.
    """
    chosen = logits_at_end(model, reading.ids, reading.mask, acts).float().cpu()
    first, second = chosen.gather(1, reading.answers).T
    return first - second


def ablated(
    prepared: Prepared, feature_acts: Float[Tensor, " n"], direction: Float[Tensor, " d_b"]
) -> Float[Tensor, "batch pos d_b"]:
    """Model B's activations without a latent's contribution: `x - f d` at each paired position."""
    written = torch.zeros_like(prepared.b.acts)
    written[prepared.text, prepared.position_b] = feature_acts[:, None] * direction
    return prepared.b.acts - written


def added(
    reading: PatchedReading, direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Activations with a direction added at each position of the prompts except the first."""
    where = reading.mask.bool()
    where[:, 0] = False
    return reading.acts + where[..., None] * direction


ControlKind = Literal["isotropic", "covariance"]
KINDS: tuple[ControlKind, ...] = ("isotropic", "covariance")


def control_directions(
    kind: ControlKind, n: int, norm: Tensor | float, rows: Float[Tensor, "n_rows d"], seed: int
) -> Float[Tensor, "n d"]:
    """Random directions with a given norm, isotropic or with the covariance of `rows`, so that they
    lie in directions the model uses."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "isotropic":
        drawn = torch.randn(n, rows.shape[1], generator=generator)
    else:
        drawn = drawn_directions(rows, n, generator)
    return drawn / drawn.norm(dim=-1, keepdim=True) * norm
