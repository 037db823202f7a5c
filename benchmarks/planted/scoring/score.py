"""Scores whether a crosscoder found the planted difference: a highly ranked latent that detects the
behavior and causes it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.planted.scoring.effects import N_CONTROLS, alone, beside_random
from benchmarks.planted.scoring.patching import ablated, added
from benchmarks.planted.scoring.probes import (
    Probe,
    Probes,
    activations,
    auc_bound,
    detection,
)
from sae_lens_dfc.crosscoders.groups import B_EXCLUSIVE
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import (
    ONE_SIDED,
    both_decoder_differences,
    relative_decoder_differences,
    relative_decoder_norms,
)
from sae_lens_dfc.stats.affine_maps import AffineMaps

R = 10
"""Number of top-ranked latents considered."""
MIN_AUC = 0.8
ALPHAS = (0.5, 1.0, 2.0)
"""Strengths of addition in units of the latent's maximum activation; discovery prompts select
one."""
MIN_ROWS = 20
"""Minimum number of training rows on which a candidate is active."""
MAX_NORM_OF_A = 0.53
"""Maximum relative decoder norm of a candidate: its decoder norm in B is at least 0.9 of that in
A."""
N_ROWS_FOR_COVARIANCE = 4096
CHANGES = {
    "ablation": "x_b - f (d_b - d_a)",
    "ablation_whole": "x_b - f d_b",
    "addition_b": "x_b + alpha f_max (d_b - d_a)",
    "addition_a": "x_a + alpha f_max (d_b - d_a)",
}
"""Formula of each effect; `d_a` is 0 for a B-exclusive latent."""


@torch.no_grad()
def ranking(
    crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"], affine_maps: AffineMaps | None
) -> Int[Tensor, " _"]:
    """Rank latents not weaker in B than in A by the size of the difference they make between the
    models.

    The size is `f_top |d_b - d_a|` times the relative decoder difference, where `f_top` is the mean
    of a latent's `MIN_ROWS` largest activations. A latent with a large difference in a few places
    ranks before one with a small difference everywhere, and a B-exclusive latent before a shared
    one.
    """
    feature_acts = activations(crosscoder, rows)
    top = feature_acts.topk(MIN_ROWS, dim=0).values.mean(dim=0)
    made = top * both_decoder_differences(crosscoder, affine_maps)[1].norm(dim=-1)
    value = made * relative_decoder_differences(crosscoder, affine_maps)
    fires = (feature_acts > 0).sum(dim=0) >= MIN_ROWS
    kept = (fires & (relative_decoder_norms(crosscoder) <= MAX_NORM_OF_A)).nonzero()[:, 0]
    return kept[(-value[kept]).argsort()].cpu()


class Latent(NamedTuple):
    """A latent's directions in model B."""

    number: int
    direction: Float[Tensor, " d_b"]
    """Its model-specific direction: decoder in B minus decoder in A."""
    whole: Float[Tensor, " d_b"]
    """Its decoder in B."""
    largest: float
    """Its maximum activation on the training rows."""

    @classmethod
    def of(cls, crosscoder: Crosscoder, number: int, probes: Probes) -> "Latent":
        whole = crosscoder.W_dec.detach()[number, crosscoder.partition.models["b"]]
        direction = both_decoder_differences(crosscoder, probes.affine_maps)[1][number]
        return cls(
            number, direction, whole, float(activations(crosscoder, probes.rows)[:, number].max())
        )


def fall(
    probe: Probe, feature_acts: Float[Tensor, " n"], direction: Float[Tensor, " d_b"]
) -> Float[Tensor, " n_items"]:
    """Decrease of B's preference for the behavior when a latent's contribution along this direction
    is ablated."""
    return -probe.behavior_b.rise(ablated(probe.behavior, feature_acts, direction))


def chosen(
    crosscoder: Crosscoder, probes: Probes, order: Sequence[int], aucs: Float[Tensor, " d_sae"]
) -> int:
    """The rank, from 0, of the best of the first `R` candidates, using only discovery prompts.

    Among candidates whose AUROC for triggering prompts against controls exceeds `MIN_AUC` with its
    lower confidence bound, selects the one whose ablation lowers the preference most; if there is
    none, the one with the largest AUROC.
    """
    first, probe = list(order[:R]), probes.discovery
    sure = auc_bound(aucs, probe.behavior.n_items, probe.control.n_items)
    found = [rank for rank, latent in enumerate(first) if sure[latent] >= MIN_AUC]
    if not found:
        return max(range(len(first)), key=lambda rank: float(aucs[first[rank]]))
    acts = activations(crosscoder, probe.behavior.rows)
    directions = both_decoder_differences(crosscoder, probes.affine_maps)[1]

    def falls(rank: int) -> float:
        number = first[rank]
        return float(fall(probe, acts[:, number], directions[number]).mean())

    return max(found, key=falls)


def other_differences(
    crosscoder: Crosscoder, probes: Probes, order: Sequence[int], seed: int
) -> Float[Tensor, "k d_b"]:
    """Model-specific directions of `N_CONTROLS` latents sampled from the ranking below the first
    `R`."""
    below = torch.tensor(order[R:])
    drawn = torch.randperm(len(below), generator=torch.Generator().manual_seed(seed))[:N_CONTROLS]
    found = both_decoder_differences(crosscoder, probes.affine_maps)[1][below[drawn]]
    return found[found.norm(dim=-1) > 0]


def best_alpha(probe: Probe, latent: Latent) -> float:
    """The strength at which adding the latent raises B's preference most on these prompts."""
    side = probe.control_b

    def rise(alpha: float) -> float:
        direction = alpha * latent.largest * latent.direction
        return float(side.rise(added(side.reading, direction)).mean())

    return max(ALPHAS, key=rise)


def score(crosscoder: Crosscoder, probes: Probes, seed: int) -> dict[str, Any]:
    """Score whether the crosscoder found the planted difference.

    Returns:
        The latent selected on discovery prompts, its `rank` from 1, and how it is `exclusive`. On
        held-out prompts, its `auc` and, in nats, the effects of ablating its model-specific
        direction in B (`ablation`: `x_b - f (d_b - d_a)`, as in the KL evaluation of Minder et al.;
        for an exclusive latent this is its whole contribution) and of adding `d_b - d_a` to B
        (`addition_b`), both as returned by `beside_random`. Without controls: the effects of adding
        it to A, if widths are equal (`addition_a`), and of ablating its whole decoder direction in
        B (`ablation_whole`: `x_b - f d_b`). It is `found` if it separates the prompts (`MIN_AUC`)
        and is among the first `R` of the ranking, and `confirmed` if it is found and both its
        ablation and its addition to B exceed random directions.
    """
    order = ranking(crosscoder, probes.rows, probes.affine_maps).tolist()
    aucs = detection(crosscoder, probes.discovery)
    rank = chosen(crosscoder, probes, order, aucs)
    latent = Latent.of(crosscoder, order[rank], probes)
    d_a = crosscoder.cfg.d_a
    rows_b = probes.rows[:N_ROWS_FOR_COVARIANCE, d_a:]
    test = probes.test
    acts = activations(crosscoder, test.behavior.rows)[:, latent.number]
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
            relative_decoder_differences(crosscoder, probes.affine_maps)[latent.number]
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
    """The latent of any rank with the best AUROC on discovery prompts: its AUROC on the test split,
    partition and relative norm."""
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
