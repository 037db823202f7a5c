"""Measures each model's next-token loss and KL divergence with its activations replaced by the
crosscoder's reconstruction."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.steering.splicing import (
    UNTOUCHED,
    Edit,
    SplicedReading,
    loss_sums,
    predicting,
    reading_of,
)
from sae_lens_dfc.crosscoders.groups import EXCLUSIVE_TO, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import decode_blocks
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.stats.jackknife import Jackknife, Sums

Order = Callable[[int], Int[Tensor, " n"]]
"""Maps a number of rows to a permutation: the row whose B side each row gets."""
ZERO, MEAN = "/zero", "/mean"
# Logits per forward pass: four contexts of 128 tokens for Gemma. Two such tensors are held at a
# time, in the model's dtype.
MAX_LOGITS = 2**27


@torch.no_grad()
def downstream(
    crosscoder: Crosscoder,
    pair: ModelPair,
    batches: Iterable[PairedRows],
    means: Float[Tensor, " d_in"],
    order_b: Order | None = None,
) -> dict[str, float]:
    """Next-token loss of both models, and KL divergence from the untouched model, with activations
    at the paired positions replaced.

    All other positions keep theirs: unpaired ones, outliers and the first. The replacement, by
    suffix of the key:

    - no suffix: the full reconstruction.
    - `/shared_only`, `/exclusive_only`: `b_dec` plus the contribution of the shared latents, or of
      the model's own exclusive latents.
    - `/without_exclusive`: the untouched activation minus the contribution of the model's own
      exclusive latents. The reconstruction error is kept, so this isolates those latents' effect.
    - `/zero`, `/mean`: 0, or the model's mean activation; `/untouched`: nothing is replaced.

    A model without exclusive latents has only the full reconstruction, which is the shared
    latents'. Losses and divergences are means over the positions whose next token is known and that
    come at or after the first replaced position of their context; earlier ones cannot change.
    `loss_recovered` is `(loss/zero - loss) / (loss/zero - loss/untouched)`, and
    `loss_recovered_from_mean` the same with `loss/mean`; 1 is the untouched model, 0 the ablated
    one.

    The models run in their own dtype; in bfloat16 a logit of 20 is accurate to 0.06, in the
    untouched model as well.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole: not with `drop_unused_layers`.
        batches: Rows of raw activations with their contexts, from `paired_activations`; positions
            without a row are not replaced.
        means: Mean of both models' raw activations.
        order_b: For a null: encodes each row of A with another row of B from the same batch. Each
            model's reconstruction is placed at the position of that model's activations.

    Returns:
        For `m` in `a`, `b`: `loss/m…` and `kl/m…` (KL(untouched || changed)) in nats per token,
        `loss_recovered/m…`, `loss_recovered_from_mean/m…`, and `spliced_share/m`, the share of the
        model's tokens, without the beginning-of-sequence token, whose activations are replaced.
        Each with its `/se`.

    Raises:
        ValueError: There are no rows, they come without contexts, or a model was loaded without its
            upper layers.
    """
    check_whole(pair)
    metric = Jackknife(_measures)
    for rows in tqdm(batches, "Downstream", leave=False):
        if len(rows.acts) == 0:
            continue
        edits = edits_of(crosscoder, rows.acts, means, order_b)
        for sums in spliced_sums(pair, rows, edits):
            metric.update(sums)
    return metric.compute()


def spliced_sums(
    pair: ModelPair, rows: PairedRows, edits: Mapping[str, Mapping[str, Edit]]
) -> Iterator[dict[str, Float[Tensor, "*shape"]]]:
    """Both models' sums of loss and KL under each edit, for as many contexts at a time as fit in
    memory.

    Args:
        pair: The two models, whole.
        rows: Rows of raw activations with their contexts.
        edits: For each model (`a`, `b`) the edits of all rows, by name.

    Yields:
        For `m` in `a`, `b`: the sums `(2,)` of loss and KL in nats of each edit under `m` followed
        by its name, and of the untouched model under `m/untouched`; under `m predicted`,
        `m spliced` and `m tokens` the numbers of predicted tokens, of replaced positions and of
        tokens without the beginning-of-sequence token.

    Raises:
        ValueError: The rows come without contexts.
    """
    for part, here in _parts(pair, rows):
        sums: dict[str, Tensor] = {}
        for m, model in pair.models.items():
            reading = reading_of(model, m, part)
            of_part = {name: edit.at(here) for name, edit in edits[m].items()}
            sums |= {f"{m}{name}": x for name, x in loss_sums(model, reading, of_part).items()}
            sums |= {f"{m} {name}": x for name, x in _numbers(reading).items()}
        yield sums


def edits_of(
    crosscoder: Crosscoder,
    acts: Float[Tensor, "n d_in"],
    means: Float[Tensor, " d_in"],
    order_b: Order | None = None,
) -> dict[str, dict[str, Edit]]:
    """The replacements for each model (`a`, `b`), by suffix of the metric key; arguments as for
    `downstream`.

    Raises:
        ValueError: `order_b` does not return a permutation.
    """
    n, partition = len(acts), crosscoder.partition
    order = (torch.arange(n) if order_b is None else order_b(n)).to(crosscoder.device)
    if not torch.equal(order.sort().values, torch.arange(n, device=order.device)):
        raise ValueError(f"order_b must give each of 0 to {n - 1} once for {n} rows.")
    acts = acts.to(crosscoder.device)
    of_b = partition.models["b"]
    read = torch.cat([acts[:, partition.models["a"]], acts[order, of_b]], dim=-1)
    feature_acts = crosscoder.encode(read)
    exclusive_acts = feature_acts.clone()
    exclusive_acts[:, partition.slices[SHARED]] = 0

    def written(part: Tensor) -> Tensor:
        rebuilt = decode_blocks(part, crosscoder.W_dec, partition)
        # Put B's rows back in their original order.
        rebuilt[order, of_b] = rebuilt[:, of_b].clone()
        return rebuilt

    shared, exclusive = written(feature_acts - exclusive_acts), written(exclusive_acts)
    b_dec, means = crosscoder.b_dec, means.to(acts.device)
    edits: dict[str, dict[str, Edit]] = {}
    for m, inputs in partition.models.items():
        everywhere = {ZERO: torch.zeros_like(means), MEAN: means, "": b_dec + shared + exclusive}
        if partition.sizes[EXCLUSIVE_TO[m]] > 0:
            everywhere["/shared_only"] = b_dec + shared
            everywhere["/exclusive_only"] = b_dec + exclusive
        edits[m] = {name: Edit(x[..., inputs].expand(n, -1)) for name, x in everywhere.items()}
        if "/exclusive_only" in edits[m]:
            edits[m]["/without_exclusive"] = Edit(-exclusive[:, inputs], adds=True)
    return edits


def _parts(pair: ModelPair, rows: PairedRows) -> Iterator[tuple[PairedRows, Bool[Tensor, " n"]]]:
    """Split into as many contexts at a time as `MAX_LOGITS` allows, with a mask of their rows."""
    if not rows.contexts:
        raise ValueError(
            "These rows of activations come without their contexts, so no model can continue from them. "
            "Give them as paired_activations gives them."
        )
    for contexts in contexts_at_once(pair, rows.contexts):
        yield rows_in(rows, contexts)


def contexts_at_once(
    pair: ModelPair, contexts: Sequence[Context], max_logits: int = MAX_LOGITS
) -> Iterator[Sequence[Context]]:
    """Split into as many contexts at a time as `max_logits` allows."""
    d_vocab = max(int(model.model.cfg.d_vocab) for model in (pair.a, pair.b))
    n_positions = max((context.segments.n_tokens for context in contexts), default=1)
    size = max(1, max_logits // (n_positions * d_vocab))
    for start in range(0, len(contexts), size):
        yield contexts[start : start + size]


def _numbers(reading: SplicedReading) -> dict[str, Tensor]:
    n_tokens = (reading.mask.sum(dim=1) - reading.n_start).sum()
    numbers = {
        "spliced": len(reading.position),
        "tokens": int(n_tokens),
        "predicted": int(predicting(reading).sum()),
    }
    return {name: torch.tensor(float(n), dtype=torch.double) for name, n in numbers.items()}


def _measures(sums: Sums) -> dict[str, float]:
    result: dict[str, float] = {}
    for m in ("a", "b"):
        means = {
            name.removeprefix(m): x / sums[f"{m} predicted"]
            for name, x in sums.items()
            if name == m or name.startswith(f"{m}/")
        }
        for variant, (loss, kl) in means.items():
            result[f"loss/{m}{variant}"] = loss.item()
            if variant != UNTOUCHED:
                result[f"kl/{m}{variant}"] = kl.item()
            if variant not in (UNTOUCHED, ZERO, MEAN):
                for name, ablated in (("", ZERO), ("_from_mean", MEAN)):
                    recovered = (means[ablated][0] - loss) / (means[ablated] - means[UNTOUCHED])[0]
                    result[f"loss_recovered{name}/{m}{variant}"] = recovered.item()
        result[f"spliced_share/{m}"] = (sums[f"{m} spliced"] / sums[f"{m} tokens"]).item()
    return result


def check_whole(pair: ModelPair) -> None:
    """Check that both models predict tokens.

    Raises:
        ValueError: A model was loaded without its upper layers.
    """
    for model in (pair.a, pair.b):
        unembed = model.model.unembed.parameters()
        if len(model.model.blocks) < model.n_layers or not all(p.numel() for p in unembed):
            raise ValueError(
                f"Model {model.name!r} was loaded with drop_unused_layers, so it predicts no token. Load it without."
            )
