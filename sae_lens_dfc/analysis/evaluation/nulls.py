"""Builds null pairs, which have no difference to find, to estimate each measure's false
positives."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.causal.downstream import Order
from sae_lens_dfc.analysis.causal.following_loss import following_losses
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS, check_nulls
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


class PairTask(NamedTuple):
    """A pair of models with training and held-out activations."""

    cfg: CrosscoderRunnerConfig
    pair: ModelPair
    data: PairData
    order_b: Order | None = None
    """For shuffled pairs: the row whose B side each row of A gets."""
    following: list[Float[Tensor, "_ windows 2"]] | None = None
    """For each batch of held-out rows, both models' losses on the text after each row; none if they
    were not measured, or if the pairs are shuffled."""
    unshuffled: PairData | None = None
    """For shuffled pairs: the held-out rows as the models computed them."""

    def rows_to_splice(self, n_pairs: int) -> Iterator[PairedRows]:
        """About `n_pairs` held-out rows with their text, each model's activations at the positions
        where the model computed them; `downstream` shuffles the pairs itself, by `order_b`."""
        return (self.unshuffled or self.data).held_out_with_text(n_pairs)

    def with_losses(self, n_pairs: int | None = None) -> "PairTask":
        """The same, with the losses on about that many held-out rows; none measures all.

        Raises:
            ValueError: A model was loaded without its upper layers.
        """
        return self._replace(following=following_losses(self.pair, self.data, n_pairs))


def null_case(
    name: str, case: PairTask, seed_model: ModelConfig | None = None, in_place: bool = False
) -> PairTask:
    """A null pair on the same text with the same settings.

    - `self`: model A twice, at the positions where A and B pair. Both models have every feature, so
      every exclusive latent is a false positive.
    - `shuffle`: each row of A with the B side of another row, drawn once. The models share nothing,
      so every shared latent is a false positive.
    - `seed`: model A and a model that differs only in its initialization. Exclusive latents are
      features that two trainings of one architecture do not share.

    Args:
        name: `self`, `shuffle` or `seed`.
        case: The real pair.
        seed_model: The model with another initialization, for `seed`.
        in_place: Consume the case's training rows while building the null's; keeping both takes
            twice the memory.

    Raises:
        ValueError: The null is unknown, `seed` has no model, or its width differs from A's.
    """
    check_nulls([name], seed_model if name == "seed" else None)
    if not in_place:
        case = case._replace(data=replace(case.data, training=list(case.data.training)))
    if name == "seed":
        assert seed_model is not None
        return _seed_null(case, seed_model)
    return {"self": _self_null, "shuffle": _shuffle_null}[name](case)


def _self_null(case: PairTask) -> PairTask:
    d_a = case.pair.d_a

    def twice(rows: PairedRows) -> PairedRows:
        return rows._replace(acts=torch.cat([rows.acts[:, :d_a]] * 2, dim=-1))

    texts = [c.segments for c in case.data.contexts]
    twice_read = [Segments(t.ids_a, t.ids_a, t.ends_a, t.ends_a) for t in texts]
    contexts = [
        c._replace(segments=text) for c, text in zip(case.data.contexts, twice_read, strict=True)
    ]
    training = [twice(rows) for rows in _drained(case.data.training)]
    held_out = [twice(rows) for rows in case.data.held_out]
    data = PairData(training, held_out, contexts, {})
    following = case.following and [losses[..., [0, 0]] for losses in case.following]
    return case._replace(
        cfg=_of_one(case, case.cfg.model_a),
        pair=ModelPair(case.pair.a, case.pair.a),
        data=data,
        following=following,
    )


def _shuffle_null(case: PairTask) -> PairTask:
    generator = torch.Generator().manual_seed(case.cfg.seed)

    def order(n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=generator)

    data, d_a = case.data, case.pair.d_a
    training = _shuffled(data.training, d_a, order)
    held_out = _shuffled(list(data.held_out), d_a, order)
    shuffled = PairData(training, held_out, data.contexts, {})
    unshuffled = replace(case.data, training=[])
    return case._replace(data=shuffled, order_b=order, following=None, unshuffled=unshuffled)


def _seed_null(case: PairTask, seed_model: ModelConfig) -> PairTask:
    pair = ModelPair(case.pair.a, load_model(seed_model))
    pair.b.autocast = pair.a.autocast
    if pair.d_b != pair.d_a or pair.b.n_layers != pair.a.n_layers:
        raise ValueError(
            f"Model {pair.b.name!r} has {pair.b.n_layers} layers of width {pair.d_b}, model A ({pair.a.name!r}) "
            f"{pair.a.n_layers} of {pair.d_a}. Give another initialization of model A."
        )
    cfg = _of_one(case, seed_model)
    case.data.training.clear()
    data = PairData.collect(PairedText(cfg, pair), f"Null, {NULLS['seed']}")
    task = PairTask(cfg, pair, data)
    if case.following is None:
        return task
    return task.with_losses(
        sum(int((~x.isnan()).flatten(start_dim=1).any(dim=1).sum()) for x in case.following)
    )


def _of_one(case: PairTask, model_b: ModelConfig) -> CrosscoderRunnerConfig:
    sae = replace(case.cfg.sae, d_in=0, d_a=case.pair.d_a, d_b=case.pair.d_a)
    return replace(case.cfg, sae=sae, model_b=model_b)


def _drained(rows: list[PairedRows]) -> Iterator[PairedRows]:
    """Yield each batch and remove it from the list, so that its memory can be freed."""
    while rows:
        yield rows.pop(0)


def _shuffled(rows: list[PairedRows], d_a: int, order: Order) -> list[PairedRows]:
    of_b = torch.cat([r.acts[:, d_a:] for r in rows])
    others = order(len(of_b)).split([len(r.acts) for r in rows])
    return [
        r._replace(acts=torch.cat([r.acts[:, :d_a], of_b[other]], dim=-1))
        for r, other in zip(_drained(rows), others, strict=True)
    ]
