"""Whether a crosscoder has found what was planted: a latent high in its ranking, that fires on it and causes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.benchmark.planted.behaviours import Items
from sae_lens_dfc.benchmark.planted.causal import (
    Prepared,
    Reading,
    ablated,
    added,
    preferences,
    prepared,
)
from sae_lens_dfc.benchmark.planted.effects import beside_random
from sae_lens_dfc.benchmark.planted.organism import Organism
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import B_EXCLUSIVE
from sae_lens_dfc.metrics.exclusivity import relative_decoder_norms
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair

R = 10
"""How many latents of a ranking are looked at."""
MIN_AUC = 0.8
ALPHAS = (0.5, 1.0, 2.0)
"""Strengths of an addition, in units of the latent's largest activation, of which discovery prompts choose one."""
MAX_RELATIVE_NORM = 0.2
"""Relative decoder norm below which a latent is B's alone (arXiv 2602.11729, section 2.3)."""
N_ROWS_FOR_COVARIANCE = 4096

Ranking = Callable[[Crosscoder, Float[Tensor, "n d_in"]], Int[Tensor, " _"]]
"""Orders a crosscoder's candidates for what B alone has, best first, from rows without labels."""


def ranking(crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"]) -> Int[Tensor, " _"]:
    """B-exclusive latents by the sum of their activations, then the others that fire by relative decoder norm, B's first."""
    total = activations(crosscoder, rows).sum(dim=0).cpu()
    relative = relative_decoder_norms(crosscoder).cpu()
    fires = total > 0
    is_own = torch.zeros_like(fires)
    is_own[crosscoder.partition.slices[B_EXCLUSIVE]] = True
    own, others = (fires & is_own).nonzero()[:, 0], (fires & ~is_own).nonzero()[:, 0]
    return torch.cat([own[(-total[own]).argsort()], others[relative[others].argsort()]])


@torch.no_grad()
def activations(crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Each latent's activation at each row."""
    return torch.cat([crosscoder.encode(batch) for batch in rows.split(4096)])


class Side(NamedTuple):
    """One model on some prompts, and what it prefers there when nothing is changed."""

    model: HookedModel
    reading: Reading
    before: Float[Tensor, " n_items"]

    @classmethod
    def of(cls, model: HookedModel, reading: Reading) -> "Side":
        return cls(model, reading, preferences(model, reading, reading.acts))

    def rise(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " n_items"]:
        """By how much the preference for the behaviour rises with these activations, for each prompt."""
        return preferences(self.model, self.reading, acts) - self.before


class Probe(NamedTuple):
    """The prompts of one split as the models read them."""

    behaviour: Prepared
    control: Prepared
    behaviour_b: Side
    """Model B on the prompts for the behaviour, where an ablation should lower the preference for it."""
    control_b: Side
    """Model B on controls, where an addition should raise it."""
    control_a: Side
    """Model A on controls."""

    @classmethod
    def of(cls, pair: ModelPair, items: Items) -> "Probe":
        behaviour, control = (prepared(pair, kind) for kind in items)
        return cls(
            behaviour,
            control,
            Side.of(pair.b, behaviour.b),
            Side.of(pair.b, control.b),
            Side.of(pair.a, control.a),
        )


@dataclass(frozen=True)
class Probes:
    """All that the crosscoders of one organism are scored on."""

    discovery: Probe
    test: Probe
    rows: Float[Tensor, "n d_in"]
    """Rows of training."""

    @classmethod
    def of(cls, pair: ModelPair, organism: Organism, rows: Float[Tensor, "n d_in"]) -> "Probes":
        """Run both models over the prompts for discovery and for the test."""
        discovery, test = (Probe.of(pair, organism.items[s]) for s in ("discovery", "test"))
        return cls(discovery, test, rows)


# --- detection ---


def auc(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Area under the ROC curve of each column: the chance that a positive is above a negative, a tie being half.

    >>> auc(torch.tensor([[3.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([0.8750])
    """
    above = positive[:, None] > negative[None]
    ties = positive[:, None] == negative[None]
    return (above + 0.5 * ties).mean(dim=(0, 1))


def prompt_acts(crosscoder: Crosscoder, read: Prepared) -> Float[Tensor, "n_items d_sae"]:
    """Each latent's mean activation over the positions of a prompt."""
    mine = read.is_prompt & (read.text < read.n_items)
    feature_acts, text = activations(crosscoder, read.rows[mine]), read.text[mine]
    sums = feature_acts.new_zeros(read.n_items, feature_acts.shape[1])
    sums.index_add_(0, text, feature_acts)
    return sums / torch.bincount(text, minlength=read.n_items)[:, None]


def detection(crosscoder: Crosscoder, probe: Probe) -> Float[Tensor, " d_sae"]:
    """How well each latent tells prompts for the behaviour from controls, as an area under the ROC curve."""
    return auc(prompt_acts(crosscoder, probe.behaviour), prompt_acts(crosscoder, probe.control))


# --- cause ---


class Latent(NamedTuple):
    """A latent as it acts on model B."""

    number: int
    direction: Float[Tensor, " d_b"]
    """Its decoder in B."""
    largest: float
    """Its largest activation in training."""

    @classmethod
    def of(cls, crosscoder: Crosscoder, number: int, rows: Float[Tensor, "n d_in"]) -> "Latent":
        direction = crosscoder.W_dec.detach()[number, crosscoder.partition.models["b"]]
        return cls(number, direction, float(activations(crosscoder, rows)[:, number].max()))


def fall(
    probe: Probe, feature_acts: Float[Tensor, " n"], direction: Float[Tensor, " d_b"]
) -> Float[Tensor, " n_items"]:
    """By how much B's preference for the behaviour falls without what a latent writes in this direction."""
    return -probe.behaviour_b.rise(ablated(probe.behaviour, feature_acts, direction))


def chosen(
    crosscoder: Crosscoder, probes: Probes, order: Sequence[int], aucs: Float[Tensor, " d_sae"]
) -> int:
    """The rank, from 0, of the best of the first `R` candidates, by discovery prompts alone.

    Of those that tell prompts for the behaviour from controls, the one whose ablation lowers the
    preference most; where there is none, the one with the largest area.
    """
    first = list(order[:R])
    found = [rank for rank, latent in enumerate(first) if aucs[latent] >= MIN_AUC]
    if not found:
        return max(range(len(first)), key=lambda rank: float(aucs[first[rank]]))
    probe = probes.discovery
    acts = activations(crosscoder, probe.behaviour.rows)

    def falls(rank: int) -> float:
        direction = Latent.of(crosscoder, first[rank], probes.rows[:1]).direction
        return float(fall(probe, acts[:, first[rank]], direction).mean())

    return max(found, key=falls)


def best_alpha(probe: Probe, latent: Latent) -> float:
    """The strength at which adding the latent raises B's preference most, on these prompts."""
    side = probe.control_b

    def rise(alpha: float) -> float:
        direction = alpha * latent.largest * latent.direction
        return float(side.rise(added(side.reading, direction)).mean())

    return max(ALPHAS, key=rise)


def score(
    crosscoder: Crosscoder, probes: Probes, seed: int, rank_latents: Ranking = ranking
) -> dict[str, Any]:
    """Whether the crosscoder has found what was planted.

    Returns:
        The latent chosen by discovery prompts, its `rank` from 1, how it is `exclusive`; on held-out prompts its `auc`,
        the `ablation` effect, and the effects of its addition to B (`addition_b`) and, where widths are equal, to A
        (`addition_a`), each as `beside_random` gives it. It is `found` when it tells prompts apart (`MIN_AUC`) in the
        first `R` of the ranking, and `confirmed` when it is found and both its ablation and its addition to B are
        beyond random directions.
    """
    order = rank_latents(crosscoder, probes.rows).tolist()
    aucs = detection(crosscoder, probes.discovery)
    rank = chosen(crosscoder, probes, order, aucs)
    latent = Latent.of(crosscoder, order[rank], probes.rows)
    d_a = crosscoder.cfg.d_a
    rows = probes.rows[:N_ROWS_FOR_COVARIANCE]
    rows_a, rows_b = rows[:, :d_a], rows[:, d_a:]
    test = probes.test
    acts = activations(crosscoder, test.behaviour.rows)[:, latent.number]
    alpha = best_alpha(probes.discovery, latent)
    direction = alpha * latent.largest * latent.direction

    effects = {
        "ablation": beside_random(lambda d: fall(test, acts, d), latent.direction, rows_b, seed),
        "addition_b": beside_random(
            lambda d: test.control_b.rise(added(test.control_b.reading, d)), direction, rows_b, seed
        ),
    }
    if d_a == crosscoder.cfg.d_b:
        effects["addition_a"] = beside_random(
            lambda d: test.control_a.rise(added(test.control_a.reading, d)), direction, rows_a, seed
        )
    area = float(detection(crosscoder, test)[latent.number])
    found = area >= MIN_AUC
    return {
        "latent": latent.number,
        "rank": rank + 1,
        "exclusive": _exclusive(crosscoder, latent.number),
        "relative_norm": float(relative_decoder_norms(crosscoder)[latent.number]),
        "auc_discovery": float(aucs[latent.number]),
        "auc": area,
        "best_auc_anywhere": best_anywhere(crosscoder, probes, aucs),
        "alpha": alpha,
        "max_norm": latent.largest * float(latent.direction.norm()),
        **effects,
        "found": found,
        "confirmed": found and effects["ablation"]["beyond"] and effects["addition_b"]["beyond"],
    }


def best_anywhere(
    crosscoder: Crosscoder, probes: Probes, aucs: Float[Tensor, " d_sae"]
) -> dict[str, Any]:
    """The latent of any rank that tells discovery prompts apart best: its area on the test, partition and relative norm."""
    number = int(aucs.argmax())
    return {
        "latent": number,
        "auc": float(detection(crosscoder, probes.test)[number]),
        "partition": crosscoder.partition.name_of(number),
        "relative_norm": float(relative_decoder_norms(crosscoder)[number]),
    }


def _exclusive(crosscoder: Crosscoder, latent: int) -> str | None:
    if crosscoder.partition.name_of(latent) == B_EXCLUSIVE:
        return "partition"
    is_own = relative_decoder_norms(crosscoder)[latent] < MAX_RELATIVE_NORM
    return "relative_norm" if is_own else None
