"""Computes both models' losses on the text that follows each pair."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.downstream import check_whole, contexts_at_once
from sae_lens_dfc.analysis.steering.hooks import logits
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair, padded
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.models.hooked_model import HookedModel

WINDOWS = (1, 8)
"""Numbers of segments over which the losses are summed. On one segment, a token or two, the losses of
two models of the same text often differ by more than a quarter; on eight they seldom do."""


def following_losses(
    pair: ModelPair, data: PairData, n_pairs: int | None = None
) -> list[Float[Tensor, "_ windows 2"]]:
    """Losses of both models, in nats, on the text after each held-out row: on the next segment of
    its context, and on the next eight or as many as follow. A segment is the text from one pair to
    the next.

    Args:
        pair: The two models, whole: not with `drop_unused_layers`.
        data: Held-out rows with their text.
        n_pairs: About how many rows to measure, in whole contexts, an equal share of each batch;
            none measures all.

    Returns:
        For each batch of held-out rows, A's loss and B's on each of these windows; NaN of rows that
            are not measured or end their context.

    Raises:
        ValueError: A model was loaded without its upper layers.
    """
    check_whole(pair)
    n = sum(len(rows.acts) for rows in data.held_out) if n_pairs is None else n_pairs
    chosen = [rows.contexts for rows in data.held_out_with_text(n)]
    batches = zip(data.held_out, chosen, strict=True)
    return [
        _of_rows(pair, rows, contexts)
        for rows, contexts in tqdm(list(batches), "Losses on the text that follows", leave=False)
    ]


@torch.no_grad()
def _of_rows(
    pair: ModelPair, rows: PairedRows, contexts: Sequence[Context]
) -> Float[Tensor, "n windows 2"]:
    found = torch.full((len(rows.acts), len(WINDOWS), 2), torch.nan)
    for part in contexts_at_once(pair, contexts):
        of_models = [_of_segments(model, m, part) for m, model in pair.models.items()]
        for context, a, b in zip(part, *of_models, strict=True):
            here = rows.context == context.number
            found[here] = after_each(torch.stack([a, b], dim=1))[rows.segment[here]]
    return found


def after_each(losses: Float[Tensor, "segments m"]) -> Float[Tensor, "segments windows m"]:
    """Sums of the losses of the segments after each, the next one and the next eight, or as many as
    follow; NaN after the last one.

    >>> after_each(torch.tensor([[9.0], [2.0], [1.0]]))[:, 1, 0]
    tensor([3., 1., nan])
    """
    n = len(losses)
    upto = torch.cat([losses.new_zeros(1, losses.shape[1]), losses]).double().cumsum(dim=0)
    first = torch.arange(1, n + 1)
    windows = [upto[(first + size).clamp(max=n)] - upto[first] for size in WINDOWS]
    after = torch.stack(windows, dim=1)
    after[-1] = torch.nan
    return after.to(losses)


def _of_segments(
    model: HookedModel, m: str, contexts: Sequence[Context]
) -> Iterator[Float[Tensor, " segments"]]:
    """Each context's segments' losses in nats, that of the first without its first token."""
    texts = [context.segments for context in contexts]
    ids, mask = padded(model, [t.ids_a if m == "a" else t.ids_b for t in texts])
    outputs = logits(model, ids, mask)
    for i, text in enumerate(texts):
        last = torch.from_numpy(text.last_a if m == "a" else text.last_b)
        n = int(last[-1]) + 1
        # One context at a time: all in float32 would take twice the memory.
        next_ids = ids[i, 1:n].to(outputs.device)
        loss = cross_entropy(outputs[i, : n - 1].float(), next_ids, reduction="none").double().cpu()
        upto = torch.cat([loss.new_zeros(1), loss.cumsum(dim=0)])[last]
        yield upto.diff(prepend=upto.new_zeros(1)).float()
