"""Divergence explained: how much of the divergence between two models' predictions goes when the
changes that latents make are made in one of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.causal.common_predictions import PairedTexts, paired_texts
from sae_lens_dfc.analysis.causal.shared_vocabulary import jensen_shannon
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.activation_difference import activation_difference
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.jackknife import SE, Jackknife, Sums
from sae_lens_dfc.stats.moments import PairMoments

PREFIX = "divergence/"
BITS = f"{PREFIX}bits"
BY_SIZE, BY_GRADIENT = "by_size", "by_gradient"
"""Orders of latents: by the size of the difference that they make, and by `attribution`."""
SIZES = (1, 5, 20)
"""Numbers of latents whose changes are made together."""
N_RANDOM = 3
"""Draws of the random directions; their mean is reported."""


@dataclass(frozen=True)
class Explaining:
    """What is needed to explain the divergence between two models' predictions."""

    crosscoder: Crosscoder
    pair: ModelPair
    """The two models, whole: not with `drop_unused_layers`."""
    moments: PairMoments
    """Moments of training pairs."""
    affine_maps: AffineMaps | None
    """Affine maps between the models; none if both share one basis."""


@torch.no_grad()
def divergence_explained(
    on: Explaining,
    batches: Iterable[PairedRows],
    orders: Mapping[str, Sequence[int]],
    seed: int = 0,
) -> dict[str, float]:
    """How much of the divergence between the models' next-token predictions goes if one of them is
    changed at every paired position.

    The divergence is Jensen-Shannon's in bits, over the outcomes common to both vocabularies, at
    the paired positions. The change added to model m's activation `x_m` is

    - `ORDER/n`: what the first n latents of an order write in m and not in the other model, taken
      away: `- sum_i f_i own_i` (`both_decoder_differences`);
    - `latents`: the same of all latents;
    - `random/n`: random directions with the covariance of m's activations in place of the first
      order's `own_i`, with its norm, as the null;
    - `components/n`: the part of the models' activation difference in the n directions that hold
      most of it, over the training pairs; n numbers per position, as n latents are;
    - `mean`: the mean difference; `everything`: the whole difference, or, between two bases, what
      the map makes of it.

    Of a model in which even `everything` explains nothing beyond two standard errors, as with a
    poor map, only that is returned: the measure is not usable there.

    Args:
        on: The crosscoder, its models, and the map between them.
        batches: Held-out rows with their contexts.
        orders: Latents by the name of their order, those first whose changes are to be made first.
        seed: Seed of the random directions.

    Returns:
        `divergence/bits`, and for each model m and each change the share of it that goes,
            `divergence/m/CHANGE`: 1 if the models then predict the same, below 0 if they differ
            more. Each with its `/se`.

    Raises:
        ValueError: There are no rows, or a model was loaded without its upper layers.
    """
    rows = list(batches)
    d_a, models = on.crosscoder.cfg.d_a, on.crosscoder.partition.models
    differences = {m: activation_difference(m, on.moments, d_a, on.affine_maps) for m in models}

    def whole(m: ModelName, part: PairedTexts) -> dict[str, Tensor]:
        return {"everything": differences[m].of(part.rows.acts)}

    found = _measured(on.pair, rows, tuple(models), whole)
    usable: list[ModelName] = [m for m in models if _is_above_0(found, f"{PREFIX}{m}/everything")]
    if not usable:
        return found
    of_both = both_decoder_differences(on.crosscoder, on.affine_maps)
    own = dict(zip(models, (x.float() for x in of_both), strict=True))
    generator = torch.Generator().manual_seed(seed)
    acts = torch.cat([one.acts for one in rows]).float()
    random = {
        m: [drawn_directions(acts[:, own_dims], max(SIZES), generator) for _ in range(N_RANDOM)]
        for m, own_dims in models.items()
    }

    def changes(m: ModelName, part: PairedTexts) -> dict[str, Tensor]:
        feature_acts = on.crosscoder.encode(part.rows.acts.to(on.crosscoder.device)).float()
        of_rows = differences[m].of(part.rows.acts)
        return {
            **_of_latents(feature_acts, own[m], orders, random[m]),
            **_of_components(of_rows, differences[m].components),
            "mean": differences[m].mean.expand_as(of_rows),
        }

    return found | _measured(on.pair, rows, usable, changes)


def _is_above_0(metrics: Mapping[str, float], name: str) -> bool:
    return metrics[name] > 2 * metrics.get(name + SE, 0.0)


def _measured(
    pair: ModelPair,
    rows: Sequence[PairedRows],
    models: Sequence[ModelName],
    changes: Callable[[ModelName, PairedTexts], Mapping[str, Tensor]],
) -> dict[str, float]:
    """The divergence, and the share of it that goes with each change of each of some models."""
    metric = Jackknife(_shares)
    for part in paired_texts(pair, rows, "Divergence explained"):
        before = {m: part.predictions(m) for m in pair.models}
        n = torch.tensor(len(part.rows.acts), dtype=torch.double)
        sums = {"n": n, "bits": jensen_shannon(before["a"], before["b"]).sum().cpu()}
        for m in models:
            for name, change in changes(m, part).items():
                after = part.predictions(m, change)
                sums[f"{m}/{name}"] = jensen_shannon(after, before[OTHER[m]]).sum().cpu()
        metric.update(sums)
    return metric.compute()


def _of_components(of_rows: Tensor, components: Tensor) -> dict[str, Tensor]:
    firsts = {n: components[:, :n] for n in SIZES}
    return {f"components/{n}": of_rows @ first @ first.T for n, first in firsts.items()}


def _of_latents(
    feature_acts: Float[Tensor, "n d_sae"],
    own: Float[Tensor, "d_sae d_m"],
    orders: Mapping[str, Sequence[int]],
    random: Sequence[Float[Tensor, "_ d_m"]],
) -> dict[str, Tensor]:
    found = {"latents": -(feature_acts @ own)}
    for n in SIZES:
        for name, order in orders.items():
            first = list(order[:n])
            found[f"{name}/{n}"] = -(feature_acts[:, first] @ own[first])
        first = list(next(iter(orders.values()))[:n])
        norms = own[first].norm(dim=1, keepdim=True)
        for i, drawn in enumerate(random):
            directions = norms * normalize(drawn[: len(first)].to(own))
            found[f"random/{n}/{i}"] = -(feature_acts[:, first] @ directions)
    return found


def _shares(sums: Sums) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for name, after in sums.items():
        if name not in ("n", "bits"):
            # The draws of random directions stand under one name.
            common = "/".join(name.split("/")[:3])
            shares.setdefault(f"{PREFIX}{common}", []).append((1 - after / sums["bits"]).item())
    means = {name: sum(of_draws) / len(of_draws) for name, of_draws in shares.items()}
    return {BITS: (sums["bits"] / sums["n"]).item(), **means}
