"""A model that goes on from other activations at some positions: its next-token loss, and how far its predictions move."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import padded
from sae_lens_dfc.steering import Change, changed, logits

UNTOUCHED = "/untouched"
# Logits of how many positions are compared at a time: with more than its cache holds, a CPU is five times slower.
MAX_LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


class Edit(NamedTuple):
    """What stands at the paired positions in place of a model's activations."""

    values: Float[Tensor, "n d_model"]
    adds: bool = False
    """Whether the values are added to the activations, which otherwise leave."""

    def at(self, rows: Bool[Tensor, " n"]) -> "Edit":
        """The edit at these rows."""
        return Edit(self.values[rows.to(self.values.device)], self.adds)


class Reading(NamedTuple):
    """Contexts as one model reads them, and where in them its rows of activations are."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    n_start: Int[Tensor, " batch"]
    """Tokens of the segment that starts each context: its beginning-of-sequence token, or none."""
    context: Int[Tensor, " n"]
    """Context of each row, from 0."""
    position: Int[Tensor, " n"]
    """Position of each row in its context."""


def reading_of(model: HookedModel, m: str, rows: PairedRows) -> Reading:
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
    return Reading(ids, mask, torch.tensor(n_start), context, position)


def predicting(reading: Reading) -> Bool[Tensor, "batch pos"]:
    """Positions whose next token is known, from the first row of their context on."""
    n_contexts, n_positions = reading.ids.shape
    first = torch.full((n_contexts,), n_positions)
    first = first.scatter_reduce(0, reading.context, reading.position, "amin")
    has_next = torch.zeros_like(reading.mask, dtype=torch.bool)
    has_next[:, :-1] = reading.mask[:, 1:] == 1
    return has_next & (torch.arange(n_positions) >= first[:, None])


def spliced(reading: Reading, edit: Edit) -> Change:
    """The change that makes an edit at the rows' positions and leaves all others as they are."""

    def change(acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        where = reading.context.to(acts.device), reading.position.to(acts.device)
        values = edit.values.to(acts.device)
        acts = acts.clone()
        acts[where] = (acts[where] + values if edit.adds else values).to(acts.dtype)
        return acts

    return change


def loss_sums(
    model: HookedModel, reading: Reading, edits: Mapping[str, Edit]
) -> dict[str, Float[Tensor, "2"]]:
    """Sums of loss and of KL to the untouched model, in nats, for each edit and for `/untouched`."""
    untouched = logits(model, reading.ids, reading.mask)
    sums = {UNTOUCHED: _compare(untouched, untouched, reading)}
    for name, edit in edits.items():
        with changed(model, spliced(reading, edit)):
            sums[name] = _compare(logits(model, reading.ids, reading.mask), untouched, reading)
    return sums


def _compare(after: Tensor, untouched: Tensor, reading: Reading) -> Float[Tensor, "2"]:
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
    """`-log q[next]` and `KL(p || q)` of each row, in nats, of logits `after` (q) and `untouched` (p; none is q itself).

    >>> loss_and_kl(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]), torch.tensor([1]))
    (tensor([0.6931]), tensor([0.6931]))
    """
    log_q = after.float().log_softmax(dim=-1)
    loss = -log_q.gather(-1, next_ids[:, None])[:, 0]
    if untouched is None:
        return loss, torch.zeros_like(loss)
    log_p = untouched.float().log_softmax(dim=-1)
    p = log_p.exp()
    # What is impossible adds nothing, be it impossible in both: infinity less infinity is no number.
    return loss, (p * (log_p - log_q)).where(p != 0, 0.0).sum(dim=-1)
