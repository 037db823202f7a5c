"""Divergence explained: how much of the divergence between two models' predictions is removed when
latents' parts of the models' difference are."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.causal.common_predictions import (
    ModelDifference,
    PairedTexts,
    paired_texts,
)
from sae_lens_dfc.analysis.causal.downstream import check_whole
from sae_lens_dfc.analysis.causal.shared_vocabulary import common_outcomes, jensen_shannon
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.activation_difference import ActivationDifference, activation_difference
from sae_lens_dfc.stats.jackknife import SE, Jackknife, Sums, added
from sae_lens_dfc.stats.moments import PairMoments

PREFIX = "divergence/"
BITS, PAIRS = f"{PREFIX}bits", f"{PREFIX}pairs"
BY_EVIDENCE, BY_GRADIENT = "by_evidence", "by_gradient"
"""Orders of latents: that in which a screening tests them, and that of `attribution`."""
SIZES = (1, 5, 20)
"""Numbers of latents whose parts are removed together."""
N_RANDOM = 2
"""Draws of the random directions of each order; their mean is reported."""
Orders = Mapping[str, Mapping[ModelName, Sequence[int]]]
"""Latents to take first, by the name of their order, for each model that is changed."""
Changes = Callable[[ModelName, PairedTexts], Mapping[str, Tensor]]
"""What is added to a model's activation at each row, by name."""


@torch.no_grad()
def divergence_explained(
    on: ModelDifference,
    batches: Iterable[PairedRows],
    orders: Orders,
    moments: PairMoments,
    seed: int = 0,
) -> dict[str, float]:
    """How much of the divergence between the models' next-token predictions is removed if one of
    them is changed at every paired position.

    The divergence is Jensen-Shannon's in bits, over the outcomes common to both vocabularies, at
    the paired positions. The change added to model m's activation `x_m` is

    - `ORDER/n`: the first n latents' parts of the difference, `- sum_i f_i own_i`. This takes out
      what they write in m alone, and adds what they write in the other model alone;
    - `latents`: the same of all latents; `latents_and_bias`: and of the decoder's bias;
    - `random_ORDER/n`: random directions with the covariance of m's activations in place of
      `own_i`, with its norm and the latent's activation, as the order's null;
    - `components/n`: the part of the models' activation difference in the n directions that hold
      most of it, the mean difference included; n numbers per position, as n latents are;
    - `mean`: the mean difference (not between two bases, where the map has none);
    - `full_difference`: the whole difference, or, between two bases, what the map makes of it.

    Of a model in which even the full difference explains nothing beyond two standard errors, as
    with a poor map, only that is returned: the measure is not usable there.

    Args:
        on: The models and their difference.
        batches: Held-out rows with their contexts.
        orders: Latents to take first; not those that the rows were used to choose.
        moments: Moments of training pairs, for the components and the mean.
        seed: Seed of the random directions.

    Returns:
        `divergence/bits`, `divergence/pairs`, and for each model m and each change the share of the
            bits that is removed, `divergence/m/CHANGE`: 1 if the models then predict the same,
            below 0 if they differ more, NaN if they never differed. Each with its `/se`.

    Raises:
        ValueError: There are no rows, a model was loaded without its upper layers, or its
            probabilities are NaN.
    """
    check_whole(on.pair)
    rows = list(batches)
    d_a, d_b = on.crosscoder.cfg.d_a, on.crosscoder.cfg.d_b
    differences: dict[ModelName, ActivationDifference] = {
        m: activation_difference(m, d_a, d_b, on.affine_maps) for m in on.pair.models
    }

    def full(m: ModelName, part: PairedTexts) -> dict[str, Tensor]:
        return {"full_difference": differences[m].of(part.rows.acts)}

    found = _measured(on.pair, rows, tuple(on.pair.models), full)
    usable: list[ModelName] = [
        m for m in on.pair.models if _is_above_0(found, f"{PREFIX}{m}/full_difference")
    ]
    if not usable:
        return found
    changes = _changes(on, rows, differences, orders, moments, seed)
    return found | _measured(on.pair, rows, usable, changes)


def _is_above_0(metrics: Mapping[str, float], name: str) -> bool:
    return metrics[name] > 2 * metrics.get(name + SE, 0.0)


def _measured(
    pair: ModelPair, batches: Sequence[PairedRows], models: Sequence[ModelName], changes: Changes
) -> dict[str, float]:
    """The divergence, and the share of it that each change of each of some models removes."""
    outcomes = dict(zip(pair.models, common_outcomes(pair.a, pair.b), strict=True))
    metric = Jackknife(_shares)
    for rows in tqdm(batches, "Divergence explained", leave=False):
        sums: dict[str, Tensor] = {}
        for part in paired_texts(pair, rows, outcomes):
            before = {m: part.predictions(m) for m in pair.models}
            n = torch.tensor(len(part.compared), dtype=torch.double)
            of_part = {"n": n, "bits": _divergence(before["a"], before["b"])}
            for m in models:
                for name, change in changes(m, part).items():
                    after = part.predictions(m, change)
                    of_part[f"{m}/{name}"] = _divergence(after, before[OTHER[m]])
            sums = added(sums, of_part)
        if sums:
            metric.update(sums)
    return {**metric.compute(), PAIRS: metric.total["n"].item()}


def _divergence(p: Tensor, q: Tensor) -> Float[Tensor, ""]:
    return jensen_shannon(p, q.to(p)).sum().cpu()


def _changes(
    on: ModelDifference,
    batches: Sequence[PairedRows],
    differences: Mapping[ModelName, ActivationDifference],
    orders: Orders,
    moments: PairMoments,
    seed: int,
) -> Changes:
    """All changes of `divergence_explained` but the full difference."""
    crosscoder, generator = on.crosscoder, torch.Generator().manual_seed(seed)
    acts = torch.cat([rows.acts for rows in batches]).float()
    random = {
        m: [drawn_directions(acts[:, own_dims], max(SIZES), generator) for _ in range(N_RANDOM)]
        for m, own_dims in crosscoder.partition.models.items()
    }
    components = {m: of_m.components(moments, max(SIZES)) for m, of_m in differences.items()}
    mean = {m: of_m.mean(moments) for m, of_m in differences.items()}

    def changes(m: ModelName, part: PairedTexts) -> dict[str, Tensor]:
        feature_acts = crosscoder.encode(part.rows.acts.to(crosscoder.device)).float()
        own = on.own[m].to(feature_acts)
        of_rows, bias = (differences[m].of(x) for x in (part.rows.acts, crosscoder.b_dec[None]))
        found = {"latents": -(feature_acts @ own)}
        found["latents_and_bias"] = found["latents"] + bias.to(own)
        for n in SIZES:
            first = components[m][:, :n]
            found[f"components/{n}"] = of_rows @ first @ first.T
            for name, order in orders.items():
                found |= _of_first(feature_acts, own, list(order[m][:n]), random[m], name, n)
        if on.affine_maps is None:
            found["mean"] = mean[m].expand_as(of_rows)
        return found

    return changes


def _of_first(
    feature_acts: Float[Tensor, "rows d_sae"],
    own: Float[Tensor, "d_sae d_m"],
    first: list[int],
    random: Sequence[Float[Tensor, "_ d_m"]],
    name: str,
    n: int,
) -> dict[str, Tensor]:
    """The parts of the first latents of an order, and of random directions in their place."""
    of_first, directions = feature_acts[:, first], own[first]
    norms = directions.norm(dim=1, keepdim=True)
    found = {f"{name}/{n}": -(of_first @ directions)}
    for i, drawn in enumerate(random):
        instead = norms * normalize(drawn[: len(first)].to(own))
        found[f"random_{name}/{n}/{i}"] = -(of_first @ instead)
    return found


def _shares(sums: Sums) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for name, after in sums.items():
        if name not in ("n", "bits"):
            # The draws of random directions stand under one name.
            common = "/".join(name.split("/")[:3])
            share = 1 - after / sums["bits"].where(sums["bits"] > 0, torch.nan)
            shares.setdefault(f"{PREFIX}{common}", []).append(share.item())
    means = {name: sum(of_draws) / len(of_draws) for name, of_draws in shares.items()}
    return {BITS: (sums["bits"] / sums["n"]).item(), **means}
