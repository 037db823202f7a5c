"""Splices other activations into a model at paired positions, and measures its next-token loss and
the KL to the untouched model."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.steering.hooks import Change, changed, logits
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.pair import ModelPair, padded
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.models.hooked_model import HookedModel

UNTOUCHED = "/untouched"
# Number of logits compared at a time. A CPU is five times slower when they exceed its cache.
MAX_LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


class Edit(NamedTuple):
    """Replacement for, or addition to, a model's activations at the paired positions."""

    values: Float[Tensor, "n d_model"]
    adds: bool = False
    """Whether the values are added to the activations instead of replacing them."""

    def at(self, rows: Bool[Tensor, " n"]) -> "Edit":
        """The edit at these rows."""
        return Edit(self.values[rows.to(self.values.device)], self.adds)


class SplicedReading(NamedTuple):
    """Contexts as one model reads them, with the position of each row of activations."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    n_start: Int[Tensor, " batch"]
    """Tokens in the segment that starts each context: the beginning-of-sequence token, or none."""
    context: Int[Tensor, " n"]
    """Context of each row, from 0."""
    position: Int[Tensor, " n"]
    """Position of each row in its context."""


def reading_of(model: HookedModel, m: str, rows: PairedRows) -> SplicedReading:
    """The contexts of `rows` as model `m` (`a` or `b`) reads them.

    Raises:
        ValueError: A context is longer than the model can read.
    """
    texts = [context.segments for context in rows.contexts]
    ids, mask = padded(model, [t.ids_a if m == "a" else t.ids_b for t in texts])
    last = [t.last_a if m == "a" else t.last_b for t in texts]
    n_start = [(t.ends_a if m == "a" else t.ends_b)[0] for t in texts]
    place = {context.number: i for i, context in enumerate(rows.contexts)}
    context = torch.tensor([place[n] for n in rows.context.tolist()], dtype=torch.long)
    before = torch.tensor([0, *map(len, last)]).cumsum(0)[context]
    position = torch.from_numpy(np.concatenate(last))[before + rows.segment]
    return SplicedReading(ids, mask, torch.tensor(n_start), context, position)


def readings_of(
    pair: ModelPair, rows: PairedRows
) -> tuple[dict[ModelName, SplicedReading], dict[ModelName, Tensor]]:
    """The contexts of `rows` as each model reads them, and its activations at its hook.

    Raises:
        ValueError: A context is longer than a model can read.
    """
    readings: dict[ModelName, SplicedReading] = {}
    acts: dict[ModelName, Tensor] = {}
    for m, model in pair.models.items():
        readings[m] = reading_of(model, m, rows)
        with torch.no_grad():
            acts[m] = model.activations(readings[m].ids, readings[m].mask).float()
    return readings, acts


def predicting(reading: SplicedReading) -> Bool[Tensor, "batch pos"]:
    """Positions whose next token is known, from the first row of each context on."""
    n_contexts, n_positions = reading.ids.shape
    first = torch.full((n_contexts,), n_positions)
    first = first.scatter_reduce(0, reading.context, reading.position, "amin")
    has_next = torch.zeros_like(reading.mask, dtype=torch.bool)
    has_next[:, :-1] = reading.mask[:, 1:] == 1
    return has_next & (torch.arange(n_positions) >= first[:, None])


def spliced(reading: SplicedReading, edit: Edit) -> Change:
    """A change that applies an edit at the rows' positions and leaves all others unchanged."""

    def change(acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        where = reading.context.to(acts.device), reading.position.to(acts.device)
        values = edit.values.to(acts.device)
        acts = acts.clone()
        acts[where] = (acts[where] + values if edit.adds else values).to(acts.dtype)
        return acts

    return change


def loss_sums(
    model: HookedModel, reading: SplicedReading, edits: Mapping[str, Edit]
) -> dict[str, Float[Tensor, "2"]]:
    """Sums of loss and of KL to the untouched model, in nats, for each edit and for
    `/untouched`."""
    untouched = logits(model, reading.ids, reading.mask)
    sums = {UNTOUCHED: _compare(untouched, untouched, reading)}
    for name, edit in edits.items():
        with changed(model, spliced(reading, edit)):
            sums[name] = _compare(logits(model, reading.ids, reading.mask), untouched, reading)
    return sums


def _compare(after: Tensor, untouched: Tensor, reading: SplicedReading) -> Float[Tensor, "2"]:
    where = predicting(reading).flatten().nonzero()[:, 0]
    next_ids = reading.ids.flatten()[where + 1]
    total = torch.zeros(2, dtype=torch.double)
    at_once = MAX_LOGITS_AT_ONCE["cpu" if after.device.type == "cpu" else "cuda"]
    size = max(1, at_once // after.shape[-1])
    for at, ids in zip(where.split(size), next_ids.split(size), strict=True):
        at, ids = at.to(after.device), ids.to(after.device)
        p = None if after is untouched else untouched.flatten(end_dim=1)[at]
        both = loss_and_kl(after.flatten(end_dim=1)[at], p, ids)
        total += torch.stack(both).double().sum(dim=1).cpu()
    return total


def loss_and_kl(
    after: Float[Tensor, "n d_vocab"],
    untouched: Float[Tensor, "n d_vocab"] | None,
    next_ids: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`-log q[next]` and `KL(p || q)` of each row, in nats, of logits `after` (q) and `untouched`
    (p; none is q itself).

    >>> loss_and_kl(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]), torch.tensor([1]))
    (tensor([0.6931]), tensor([0.6931]))
    """
    log_q = after.float().log_softmax(dim=-1)
    loss = -log_q.gather(-1, next_ids[:, None])[:, 0]
    if untouched is None:
        return loss, torch.zeros_like(loss)
    log_p = untouched.float().log_softmax(dim=-1)
    p = log_p.exp()
    # Tokens with p = 0 contribute 0, even if q = 0 too, where inf - inf would give NaN.
    return loss, (p * (log_p - log_q)).where(p != 0, 0.0).sum(dim=-1)
