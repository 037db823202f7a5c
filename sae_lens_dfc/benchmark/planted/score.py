"""Whether a crosscoder has found what was planted: a latent high in its ranking, that fires on it and causes it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.benchmark.planted.causal import ablated, added
from sae_lens_dfc.benchmark.planted.effects import N_CONTROLS, alone, beside_random
from sae_lens_dfc.benchmark.planted.probes import Probe, Probes, activations, auc_bound, detection
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import B_EXCLUSIVE
from sae_lens_dfc.metrics.exclusivity import (
    ONE_SIDED,
    decoder_differences,
    relative_decoder_differences,
    relative_decoder_norms,
)
from sae_lens_dfc.metrics.stitching import Stitching

R = 10
"""How many latents of a ranking are looked at."""
MIN_AUC = 0.8
ALPHAS = (0.5, 1.0, 2.0)
"""Strengths of an addition, in units of the latent's largest activation, of which discovery prompts choose one."""
MIN_ROWS = 20
"""Rows of training on which a candidate is active."""
MAX_NORM_OF_A = 0.53
"""Relative decoder norm of a candidate at most: its decoder in B is no less than 0.9 of that in A."""
N_ROWS_FOR_COVARIANCE = 4096
CHANGES = {
    "ablation": "x_b - f (d_b - d_a)",
    "ablation_whole": "x_b - f d_b",
    "addition_b": "x_b + alpha f_max (d_b - d_a)",
    "addition_a": "x_a + alpha f_max (d_b - d_a)",
}
"""What each effect is of; `d_a` is 0 for a latent of B alone."""


@torch.no_grad()
def ranking(
    crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"], stitching: Stitching | None
) -> Int[Tensor, " _"]:
    """Latents no weaker in B than in A, by the largest difference that they make between the models.

    `f_top |d_b - d_a|` times the relative decoder difference, `f_top` being the mean of a latent's `MIN_ROWS` largest
    activations: a latent that is large in a few places goes before one that is a little different everywhere, and one
    that is B's own before one that both have.
    """
    feature_acts = activations(crosscoder, rows)
    top = feature_acts.topk(MIN_ROWS, dim=0).values.mean(dim=0)
    made = top * decoder_differences(crosscoder, stitching).norm(dim=-1)
    value = made * relative_decoder_differences(crosscoder, stitching)
    fires = (feature_acts > 0).sum(dim=0) >= MIN_ROWS
    kept = (fires & (relative_decoder_norms(crosscoder) <= MAX_NORM_OF_A)).nonzero()[:, 0]
    return kept[(-value[kept]).argsort()].cpu()


class Latent(NamedTuple):
    """A latent as it acts on model B."""

    number: int
    direction: Float[Tensor, " d_b"]
    """What B writes for it beyond what A does: its decoder in B, less that in A."""
    whole: Float[Tensor, " d_b"]
    """Its decoder in B."""
    largest: float
    """Its largest activation in training."""

    @classmethod
    def of(cls, crosscoder: Crosscoder, number: int, probes: Probes) -> "Latent":
        whole = crosscoder.W_dec.detach()[number, crosscoder.partition.models["b"]]
        direction = decoder_differences(crosscoder, probes.stitching)[number]
        return cls(
            number, direction, whole, float(activations(crosscoder, probes.rows)[:, number].max())
        )


def fall(
    probe: Probe, feature_acts: Float[Tensor, " n"], direction: Float[Tensor, " d_b"]
) -> Float[Tensor, " n_items"]:
    """By how much B's preference for the behaviour falls without what a latent writes in this direction."""
    return -probe.behaviour_b.rise(ablated(probe.behaviour, feature_acts, direction))


def chosen(
    crosscoder: Crosscoder, probes: Probes, order: Sequence[int], aucs: Float[Tensor, " d_sae"]
) -> int:
    """The rank, from 0, of the best of the first `R` candidates, by discovery prompts alone.

    Of those that tell prompts for the behaviour from controls for sure, their area being above `MIN_AUC` by more than its error
    on so few prompts, the one whose ablation lowers the preference most; where there is none, the one with the largest area.
    """
    first, probe = list(order[:R]), probes.discovery
    sure = auc_bound(aucs, probe.behaviour.n_items, probe.control.n_items)
    found = [rank for rank, latent in enumerate(first) if sure[latent] >= MIN_AUC]
    if not found:
        return max(range(len(first)), key=lambda rank: float(aucs[first[rank]]))
    acts = activations(crosscoder, probe.behaviour.rows)
    directions = decoder_differences(crosscoder, probes.stitching)

    def falls(rank: int) -> float:
        number = first[rank]
        return float(fall(probe, acts[:, number], directions[number]).mean())

    return max(found, key=falls)


def other_differences(
    crosscoder: Crosscoder, probes: Probes, order: Sequence[int], seed: int
) -> Float[Tensor, "k d_b"]:
    """What `N_CONTROLS` latents write into B beyond what they do in A, drawn from the ranking below the first `R`."""
    below = torch.tensor(order[R:])
    drawn = torch.randperm(len(below), generator=torch.Generator().manual_seed(seed))[:N_CONTROLS]
    found = decoder_differences(crosscoder, probes.stitching)[below[drawn]]
    return found[found.norm(dim=-1) > 0]


def best_alpha(probe: Probe, latent: Latent) -> float:
    """The strength at which adding the latent raises B's preference most, on these prompts."""
    side = probe.control_b

    def rise(alpha: float) -> float:
        direction = alpha * latent.largest * latent.direction
        return float(side.rise(added(side.reading, direction)).mean())

    return max(ALPHAS, key=rise)


def score(crosscoder: Crosscoder, probes: Probes, seed: int) -> dict[str, Any]:
    """Whether the crosscoder has found what was planted.

    Returns:
        The latent chosen by discovery prompts, its `rank` from 1, how it is `exclusive`; on held-out prompts its `auc`,
        and in nats the effects of taking from B what it writes beyond A (`ablation`: `x_b - f (d_b - d_a)`, as the KL evaluation
        of Minder et al. does; of an exclusive latent that is all it writes) and of adding `d_b - d_a` to B (`addition_b`), both as
        `beside_random` gives them. Without controls: that of its addition to A, where widths are equal (`addition_a`), and of taking
        its whole decoder from B (`ablation_whole`: `x_b - f d_b`). It is `found` when it tells prompts apart (`MIN_AUC`) in
        the first `R` of the ranking, and `confirmed` when it is found and both its ablation and its addition to B are
        beyond random directions.
    """
    order = ranking(crosscoder, probes.rows, probes.stitching).tolist()
    aucs = detection(crosscoder, probes.discovery)
    rank = chosen(crosscoder, probes, order, aucs)
    latent = Latent.of(crosscoder, order[rank], probes)
    d_a = crosscoder.cfg.d_a
    rows_b = probes.rows[:N_ROWS_FOR_COVARIANCE, d_a:]
    test = probes.test
    acts = activations(crosscoder, test.behaviour.rows)[:, latent.number]
    alpha = best_alpha(probes.discovery, latent)
    direction = alpha * latent.largest * latent.direction

    test_aucs = detection(crosscoder, test)
    area = float(test_aucs[latent.number])
    found = area >= MIN_AUC
    others = other_differences(crosscoder, probes, order, seed)
    ablation = beside_random(
        lambda d: fall(test, acts, d), latent.direction, rows_b, seed, others, with_controls=found
    )
    addition = beside_random(
        lambda d: test.control_b.rise(added(test.control_b.reading, d)),
        direction,
        rows_b,
        seed,
        others,
        with_controls=ablation["beyond"],
    )
    effects = {
        "ablation": ablation,
        "addition_b": addition,
        "ablation_whole": alone(fall(test, acts, latent.whole)),
    }
    if d_a == crosscoder.cfg.d_b:
        effects["addition_a"] = alone(test.control_a.rise(added(test.control_a.reading, direction)))
    return {
        "latent": latent.number,
        "rank": rank + 1,
        "exclusive": _exclusive(crosscoder, latent.number),
        "relative_norm": float(relative_decoder_norms(crosscoder)[latent.number]),
        "relative_difference": float(
            relative_decoder_differences(crosscoder, probes.stitching)[latent.number]
        ),
        "auc_discovery": float(aucs[latent.number]),
        "auc": area,
        "best_auc_anywhere": best_anywhere(crosscoder, aucs, test_aucs),
        "changes": CHANGES,
        "alpha": alpha,
        "max_norm": latent.largest * float(latent.direction.norm()),
        **effects,
        "found": found,
        "confirmed": found and ablation["beyond"] and addition["beyond"],
    }


def best_anywhere(
    crosscoder: Crosscoder, aucs: Float[Tensor, " d_sae"], test_aucs: Float[Tensor, " d_sae"]
) -> dict[str, Any]:
    """The latent of any rank that tells discovery prompts apart best: its area on the test, partition and relative norm."""
    number = int(aucs.argmax())
    return {
        "latent": number,
        "auc": float(test_aucs[number]),
        "partition": crosscoder.partition.name_of(number),
        "relative_norm": float(relative_decoder_norms(crosscoder)[number]),
    }


def _exclusive(crosscoder: Crosscoder, latent: int) -> str | None:
    if crosscoder.partition.name_of(latent) == B_EXCLUSIVE:
        return "partition"
    is_own = relative_decoder_norms(crosscoder)[latent] < 1 - ONE_SIDED
    return "relative_norm" if is_own else None
