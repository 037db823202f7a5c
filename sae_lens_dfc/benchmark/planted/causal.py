"""What becomes of a behaviour when a model goes on from changed activations: no text is generated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_dfc.benchmark.planted.behaviours import SCORED_TOKENS, Item
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.steering import changed
from sae_lens_dfc.tokens import tokenize


class Reading(NamedTuple):
    """What one model reads of some texts, as tensors padded on the right."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    acts: Float[Tensor, "batch pos d_model"]
    """At the model's hook."""
    is_prompt: Bool[Tensor, "batch pos"]
    """Where a prompt is, but for position 0."""
    is_answer: Bool[Tensor, "batch pos"]
    """Where the tokens of an answer are by which it is scored."""


@dataclass(frozen=True)
class Prepared:
    """Prompts with both ways to go on, read by both models: first all with the behaviour's answer, then all with the other."""

    n_items: int
    a: Reading
    b: Reading
    rows: Float[Tensor, "n d_in"]
    """Both models' activations at all paired positions but a model's first, text after text."""
    text: Int[Tensor, " n"]
    """Text of each row."""
    position_b: Int[Tensor, " n"]
    """Position of each row in model B."""

    @property
    def is_prompt(self) -> Bool[Tensor, " n"]:
        """Which rows are of a prompt."""
        return self.b.is_prompt[self.text, self.position_b]


@torch.no_grad()
def prepared(pair: ModelPair, items: Sequence[Item]) -> Prepared:
    """Run both models over the prompts with either answer."""
    texts = [(i.prompt, i.answer) for i in items] + [(i.prompt, i.ordinary) for i in items]
    contexts = [pair.segments(p + a)[0].after(pair.bos_segment) for p, a in texts]
    a = _reading(pair.a, [c.ids_a for c in contexts], texts)
    b = _reading(pair.b, [c.ids_b for c in contexts], texts)
    where = [_later(context) for context in contexts]
    text = torch.cat([torch.full((len(w),), i) for i, w in enumerate(where)])
    position_a, position_b = (
        torch.cat([torch.from_numpy(last)[w] for last, w in zip(lasts, where, strict=True)])
        for lasts in ([c.last_a for c in contexts], [c.last_b for c in contexts])
    )
    rows = torch.cat([a.acts[text, position_a], b.acts[text, position_b]], dim=-1)
    return Prepared(len(items), a, b, rows, text, position_b)


def _later(context: Segments) -> Int[Tensor, " _"]:
    return torch.from_numpy(((context.last_a > 0) & (context.last_b > 0)).nonzero()[0])


def _reading(
    model: HookedModel, ids: Sequence[object], texts: Sequence[tuple[str, str]]
) -> Reading:
    rows = [torch.as_tensor(i) for i in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask, is_prompt, is_answer = (torch.zeros_like(padded, dtype=torch.bool) for _ in range(3))
    for i, (row, (prompt, answer)) in enumerate(zip(rows, texts, strict=True)):
        n_bos = len(model.bos_ids)
        ends = torch.as_tensor(tokenize(model.tokenizer, prompt + answer).ends)
        n_prompt = n_bos + int((ends <= len(prompt)).sum())
        mask[i, : len(row)] = True
        is_prompt[i, 1:n_prompt] = True
        is_answer[i, n_prompt : min(len(row), n_prompt + SCORED_TOKENS)] = True
    acts = model.activations(padded, mask.long()).float()
    return Reading(padded, mask.long(), acts, is_prompt, is_answer)


class _PassThrough(nn.Module):
    @override
    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states


@contextmanager
def without_lower_blocks(model: HookedModel) -> Iterator[None]:
    """In the block the model does not run the blocks below the one at whose output it is read.

    Whoever puts activations in place at the hook gets the same logits, in half the time.

    Raises:
        ValueError: The hook is not the output of a block.
    """
    kind, layer, rest = model.hook_name.split(".", 2)
    if kind != "blocks" or rest != "hook_resid_post":
        raise ValueError(
            f"{model.hook_name} is not a block's output, such as blocks.3.hook_resid_post."
        )
    blocks: Any = model.model.blocks
    lower = list(blocks[: int(layer)])
    try:
        for i in range(int(layer)):
            blocks[i] = _PassThrough()
        yield
    finally:
        for i, block in enumerate(lower):
            blocks[i] = block


@torch.no_grad()
def preferences(
    model: HookedModel, reading: Reading, acts: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " n_items"]:
    """By how much the model prefers each prompt's first way to go on to its second, when it goes on from `acts` at its hook.

    The mean log-probability of the first answer's first tokens minus that of the second's, in nats per token.
    """
    targets = reading.is_answer.nonzero()
    positions = targets[:, 1] - 1
    kept = torch.arange(int(positions.min()), int(positions.max()) + 1)
    with without_lower_blocks(model), changed(model, lambda x: acts.to(x)):
        logits = model.model(
            reading.ids.to(model.device),
            attention_mask=reading.mask.to(model.device),
            return_type="logits",
            logits_to_keep=kept,
        )
    chosen = logits[targets[:, 0], positions - kept[0]].float().log_softmax(dim=-1).cpu()
    tokens = reading.ids[targets[:, 0], targets[:, 1]]
    values = chosen.gather(1, tokens[:, None])[:, 0]
    sums = torch.zeros(len(reading.ids)).index_add_(0, targets[:, 0], values)
    first, second = (sums / reading.is_answer.sum(dim=1)).chunk(2)
    return first - second


def ablated(
    prepared: Prepared, feature_acts: Float[Tensor, " n"], direction: Float[Tensor, " d_b"]
) -> Float[Tensor, "batch pos d_b"]:
    """Model B's activations without a latent's contribution: `x - f d` at each paired position."""
    return prepared.b.acts - contribution(prepared, feature_acts[:, None], direction[None])


def contribution(
    prepared: Prepared, feature_acts: Float[Tensor, "n k"], directions: Float[Tensor, "k d_b"]
) -> Float[Tensor, "batch pos d_b"]:
    """What latents write into model B: `sum_j f_j d_j` at each paired position, zero elsewhere."""
    result = torch.zeros_like(prepared.b.acts)
    result[prepared.text, prepared.position_b] = feature_acts @ directions
    return result


def added(
    reading: Reading, direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Activations with a direction added at each position of the prompts but the first."""
    return reading.acts + reading.is_prompt[..., None] * direction


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
        drawn = torch.randn(n, len(rows), generator=generator) @ (rows - rows.mean(dim=0))
    return drawn / drawn.norm(dim=-1, keepdim=True) * norm
