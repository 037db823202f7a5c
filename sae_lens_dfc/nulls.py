"""Pairs on which there is nothing to find: what is measured there is how far a measure deceives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.metrics.claims import LatentEvidence, oriented
from sae_lens_dfc.metrics.downstream import Order
from sae_lens_dfc.metrics.significance import share_beyond
from sae_lens_dfc.models import ModelConfig, load_model
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText

NULLS = {
    "self": "model A twice",
    "shuffle": "pairs shuffled",
    "seed": "two initialisations",
}


class Case(NamedTuple):
    """A pair of models with its activations, to train on and to measure."""

    cfg: CrosscoderRunnerConfig
    pair: ModelPair
    data: PairData
    order_b: Order | None = None
    """Whose B side each row of A is encoded with, where pairs are shuffled."""


def null_case(name: str, case: Case, seed_model: ModelConfig | None = None) -> Case:
    """A pair with nothing to find, of the same text and the same settings.

    - `self`: model A twice, at the positions where A and B pair. Both models have every feature, so what is exclusive
      is false.
    - `shuffle`: each row of A with the B side of another, drawn once. The models have nothing in common, so what is
      shared is false.
    - `seed`: model A and a model that differs from it in nothing but its initialisation. What is exclusive is what two
      trainings of one architecture do not share.

    Args:
        name: One of these.
        case: The real pair.
        seed_model: The other initialisation, for `seed`.

    Raises:
        ValueError: There is no such null, or `seed` has no model, or its width is not A's.
    """
    check_nulls([name], seed_model if name == "seed" else None)
    if name == "seed":
        assert seed_model is not None
        return _seed_null(case, seed_model)
    return {"self": _self_null, "shuffle": _shuffle_null}[name](case)


def check_nulls(names: Sequence[str], seed_model: ModelConfig | str | None) -> None:
    """Refuse nulls that there are not.

    Raises:
        ValueError: There is none of such a name, or `seed` has no model, or a model has no `seed`.
    """
    unknown = [name for name in names if name not in NULLS]
    if unknown:
        raise ValueError(f"There is no null {unknown[0]!r}. Choose from {', '.join(NULLS)}.")
    if ("seed" in names) != (seed_model is not None):
        raise ValueError(
            "The null 'seed' goes with --seed-model, a model that differs from model A in nothing but its initialisation. "
            "Give both or none."
        )


def _self_null(case: Case) -> Case:
    d_a = case.pair.d_a

    def twice(rows: PairedRows) -> PairedRows:
        return rows._replace(acts=torch.cat([rows.acts[:, :d_a]] * 2, dim=-1))

    texts = [c.segments for c in case.data.contexts]
    twice_read = [Segments(t.ids_a, t.ids_a, t.ends_a, t.ends_a) for t in texts]
    contexts = [
        c._replace(segments=text) for c, text in zip(case.data.contexts, twice_read, strict=True)
    ]
    data = _changed(case.data, twice)
    data.contexts = contexts
    return Case(_of_one(case, case.cfg.model_a), ModelPair(case.pair.a, case.pair.a), data)


def _shuffle_null(case: Case) -> Case:
    generator = torch.Generator().manual_seed(case.cfg.seed)

    def order(n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=generator)

    data, d_a = case.data, case.pair.d_a
    training, held_out = (_shuffled(rows, d_a, order) for rows in (data.training, data.held_out))
    return case._replace(data=PairData(training, held_out, data.contexts, {}), order_b=order)


def _seed_null(case: Case, seed_model: ModelConfig) -> Case:
    pair = ModelPair(case.pair.a, load_model(seed_model))
    pair.b.autocast = pair.a.autocast
    if pair.d_b != pair.d_a or pair.b.n_layers != pair.a.n_layers:
        raise ValueError(
            f"Model {pair.b.name!r} has {pair.b.n_layers} layers of width {pair.d_b}, model A ({pair.a.name!r}) "
            f"{pair.a.n_layers} of {pair.d_a}: not another initialisation of it."
        )
    cfg = _of_one(case, seed_model)
    return Case(cfg, pair, PairData.collect(PairedText(cfg, pair), f"Null, {NULLS['seed']}"))


def _of_one(case: Case, model_b: ModelConfig) -> CrosscoderRunnerConfig:
    sae = replace(case.cfg.sae, d_in=0, d_a=case.pair.d_a, d_b=case.pair.d_a)
    return replace(case.cfg, sae=sae, model_b=model_b)


def _changed(data: PairData, change: Callable[[PairedRows], PairedRows]) -> PairData:
    training, held_out = (
        [change(rows) for rows in part] for part in (data.training, data.held_out)
    )
    return PairData(training, held_out, data.contexts, {})


def _shuffled(rows: list[PairedRows], d_a: int, order: Order) -> list[PairedRows]:
    of_b = torch.cat([r.acts[:, d_a:] for r in rows])
    parts = of_b[order(len(of_b))].split([len(r.acts) for r in rows])
    return [
        r._replace(acts=torch.cat([r.acts[:, :d_a], b], dim=-1))
        for r, b in zip(rows, parts, strict=True)
    ]


def beyond_null(name: str, run: LatentEvidence, null: LatentEvidence) -> dict[str, float]:
    """By measure, the share of the run's latents that the null has no more than a twentieth of.

    Keys are `MEASURE/GROUP`. Beside `self` and `seed`, where nothing is exclusive, it is the share of each model's candidates
    more exclusive than 95 % of the null's candidates of both models. Beside `shuffle`, where nothing is shared, it is
    the share of the shared latents less exclusive than 95 % of the null's.
    """
    of_run, of_null = oriented(run), oriented(null)
    if name == "shuffle":
        ours, theirs = run.groups[SHARED], null.groups[SHARED]
        return {
            f"{measure}/{SHARED}": share_beyond(-values[ours], -of_null[measure][theirs])
            for measure, values in of_run.items()
        }
    there = null.groups[A_EXCLUSIVE] | null.groups[B_EXCLUSIVE]
    return {
        f"{measure}/{group}": share_beyond(values[run.groups[group]], of_null[measure][there])
        for measure, values in of_run.items()
        for group in (A_EXCLUSIVE, B_EXCLUSIVE)
    }
