"""What becomes of a behaviour when a model goes on from changed activations: no text is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.activations import after_first_position
from sae_lens_dfc.benchmark.planted.behaviours import Item
from sae_lens_dfc.metrics.verification import drawn_directions
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair, padded
from sae_lens_dfc.steering import logits_at_end
from sae_lens_dfc.tokens import tokenize


class Reading(NamedTuple):
    """What one model reads of some prompts, as tensors padded on the right."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    acts: Float[Tensor, "batch pos d_model"]
    """At the model's hook."""
    answers: Int[Tensor, "batch 2"]
    """The first token of the behaviour's answer and of the ordinary one: those after it follow from it wherever it stands."""


@dataclass(frozen=True)
class Prepared:
    """Prompts read by both models."""

    a: Reading
    b: Reading
    rows: Float[Tensor, "n d_in"]
    """Both models' activations at all paired positions but a model's first, prompt after prompt."""
    text: Int[Tensor, " n"]
    """Prompt of each row."""
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
) -> Reading:
    ids, mask = padded(model, rows)
    answers = [
        [first_token(model.tokenizer, item.prompt, way) for way in (item.answer, item.ordinary)]
        for item in items
    ]
    acts = model.activations(ids, mask).float()
    return Reading(ids, mask, acts, torch.tensor(answers))


def first_token(tokenizer: Any, prompt: str, answer: str) -> int:
    """The token with which an answer begins after a prompt.

    Raises:
        ValueError: The prompt's tokens change when the answer follows.
    """
    alone, both = (list(tokenize(tokenizer, text).ids) for text in (prompt, prompt + answer))
    if both[: len(alone)] != alone or len(both) == len(alone):
        raise ValueError(f"{answer!r} does not begin a token of its own after {prompt!r}.")
    return int(both[len(alone)])


@torch.no_grad()
def preferences(
    model: HookedModel, reading: Reading, acts: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " n_items"]:
    """By how much the model prefers each prompt's behaviour to its ordinary answer, when it goes on from `acts` at its hook.

    The log-probability of the behaviour's first token minus that of the ordinary answer's, in nats.
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
    reading: Reading, direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Activations with a direction added at each position of the prompts but the first."""
    where = reading.mask.bool()
    where[:, 0] = False
    return reading.acts + where[..., None] * direction


Kind = Literal["isotropic", "covariance"]
KINDS: tuple[Kind, ...] = ("isotropic", "covariance")


def random_directions(
    kind: Kind, n: int, norm: Tensor | float, rows: Float[Tensor, "n_rows d"], seed: int
) -> Float[Tensor, "n d"]:
    """Directions of one norm, drawn evenly, or with the covariance of `rows`: those that the model does use."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "isotropic":
        drawn = torch.randn(n, rows.shape[1], generator=generator)
    else:
        drawn = drawn_directions(rows, n, generator)
    return drawn / drawn.norm(dim=-1, keepdim=True) * norm
