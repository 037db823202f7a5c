"""Divergence explained: how much of the divergence between two models' predictions goes when the
changes that latents make are made in one of them; and which latents this depends on, by gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.causal.downstream import check_whole, contexts_at_once
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.steering.hooks import logits_from
from sae_lens_dfc.analysis.steering.splicing import Edit, SplicedReading, reading_of, spliced
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import OTHER, ModelName
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
# Probabilities in float64 of so many rows and outcomes are held at a time.
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class Difference:
    """The difference between two models' activations, in the basis of one of them: what has to be
    added to that model's activation to make it the other's, or what an affine map makes of the
    other's."""

    matrix: Float[Tensor, "d_in d_m"]
    bias: Float[Tensor, " d_m"]
    mean: Float[Tensor, " d_m"]
    """Mean difference over the fitted pairs."""
    components: Float[Tensor, "d_m n"]
    """The orthonormal directions that hold most of it, the one with most first."""

    def of(self, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_m"]:
        return acts @ self.matrix + self.bias


def difference_in(
    m: ModelName, moments: PairMoments, d_a: int, affine_maps: AffineMaps | None
) -> Difference:
    """The difference in the basis of model m.

    Args:
        m: `a` or `b`.
        moments: Moments of training pairs.
        d_a: Width of model A.
        affine_maps: Affine maps between the models; none if both share one basis.
    """
    d_b = len(moments.mean) - d_a
    own = torch.eye(d_a if m == "a" else d_b)
    if affine_maps is None:
        other, bias = own, torch.zeros(len(own))
    elif m == "a":
        other = affine_maps.b_to_a.cpu()
        bias = affine_maps.mean_a.cpu() - affine_maps.mean_b.cpu() @ other
    else:
        other = affine_maps.a_to_b.cpu()
        bias = affine_maps.mean_b.cpu() - affine_maps.mean_a.cpu() @ other
    matrix = torch.cat([-own, other] if m == "a" else [other, -own])
    exact = matrix.double()
    mean = moments.mean @ exact + bias.double()
    squares = exact.T @ moments.covariance @ exact + torch.outer(mean, mean)
    components = torch.linalg.eigh(squares).eigenvectors.flip(1)[:, : max(SIZES)]
    return Difference(matrix, bias, mean.float(), components.float())


class _Part(NamedTuple):
    """Some contexts, with both models' tokens and activations at the hook."""

    rows: PairedRows
    readings: Mapping[ModelName, SplicedReading]
    acts: Mapping[ModelName, Tensor]


def _parts(pair: ModelPair, batches: Iterable[PairedRows], what: str) -> Iterator[_Part]:
    check_whole(pair)
    for rows in tqdm(list(batches), what, leave=False):
        for contexts in contexts_at_once(pair, rows.contexts, MAX_LOGITS):
            part, _ = rows_in(rows, contexts)
            readings: dict[ModelName, SplicedReading] = {}
            acts: dict[ModelName, Tensor] = {}
            for m, model in pair.models.items():
                readings[m] = reading_of(model, m, part)
                with torch.no_grad():
                    acts[m] = model.activations(readings[m].ids, readings[m].mask).float()
            yield _Part(part, readings, acts)


def _probabilities(
    pair: ModelPair, part: _Part, m: ModelName, of_model: Outcomes, change: Tensor | None
) -> Float[Tensor, "n outcomes"]:
    """Model m's next-token probabilities at each row, with `change` added to its activations."""
    reading, acts = part.readings[m], part.acts[m]
    if change is not None:
        acts = spliced(reading, Edit(change, adds=True))(acts)
    where = reading.context, reading.position
    found = logits_from(pair.models[m], reading.ids, reading.mask, acts, *where)
    return outcome_probabilities(found, of_model)


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
    differences = {m: difference_in(m, on.moments, d_a, on.affine_maps) for m in models}

    def whole(m: ModelName, part: _Part) -> dict[str, Tensor]:
        return {"everything": differences[m].of(part.rows.acts.float())}

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

    def changes(m: ModelName, part: _Part) -> dict[str, Tensor]:
        feature_acts = on.crosscoder.encode(part.rows.acts.to(on.crosscoder.device)).float()
        of_rows = differences[m].of(part.rows.acts.float())
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
    changes: Callable[[ModelName, _Part], Mapping[str, Tensor]],
) -> dict[str, float]:
    """The divergence, and the share of it that goes with each change of each of some models."""
    outcomes = dict(zip(("a", "b"), common_outcomes(pair.a, pair.b), strict=True))
    metric = Jackknife(_shares)
    for part in _parts(pair, rows, "Divergence explained"):
        before = {m: _probabilities(pair, part, m, outcomes[m], None) for m in pair.models}
        n = torch.tensor(len(part.rows.acts), dtype=torch.double)
        sums = {"n": n, "bits": jensen_shannon(before["a"], before["b"]).sum().cpu()}
        for m in models:
            for name, change in changes(m, part).items():
                after = _probabilities(pair, part, m, outcomes[m], change)
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


def attribution(on: Explaining, batches: Iterable[PairedRows]) -> Float[Tensor, " d_sae"]:
    """By how many bits per pair the divergence would fall, to first order, if what each latent
    writes in one model and not in the other were taken away there; the mean over changing A and
    changing B. One backward pass ranks all latents (attribution patching, arXiv 2310.10348).

    Args:
        on: The crosscoder, its models, and the map between them.
        batches: Rows with their contexts.

    Raises:
        ValueError: A model was loaded without its upper layers.
    """
    crosscoder, pair = on.crosscoder, on.pair
    own = dict(zip(pair.models, both_decoder_differences(crosscoder, on.affine_maps), strict=True))
    outcomes = dict(zip(pair.models, common_outcomes(pair.a, pair.b), strict=True))
    total, n = torch.zeros(crosscoder.cfg.d_sae, device=crosscoder.device), 0
    for part in _parts(pair, batches, "Attribution"):
        with torch.no_grad():
            feature_acts = crosscoder.encode(part.rows.acts.to(crosscoder.device)).float()
            before = {m: _probabilities(pair, part, m, outcomes[m], None) for m in pair.models}
        for m in pair.models:
            gradient = _gradient(pair, part, m, outcomes[m], before[OTHER[m]]).to(feature_acts)
            total += ((gradient @ own[m].float().T) * feature_acts).sum(dim=0) / 2
        n += len(part.rows.acts)
    return total / max(1, n)


def _gradient(
    pair: ModelPair, part: _Part, m: ModelName, of_model: Outcomes, other: Tensor
) -> Float[Tensor, "n d_m"]:
    """Gradient of the summed divergence with respect to the model's activation at each row."""
    change = part.acts[m].new_zeros(len(part.rows.acts), part.acts[m].shape[-1])
    change.requires_grad_()
    with torch.enable_grad():
        own = _probabilities(pair, part, m, of_model, change)
    with torch.no_grad():
        # The derivative of Jensen-Shannon's divergence in bits; 0 times infinity where p is 0.
        mean = (own + other) / 2
        slope = ((own / mean).log2() / 2).where(own > 0, 0.0)
    [gradient] = torch.autograd.grad(own, change, slope)
    return gradient
