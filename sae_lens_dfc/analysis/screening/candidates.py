"""Ranks all latents as candidate differences, selects those to test, and draws their control
directions; every stage counts its intake and output."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.latents.max_activating import FiringPosition, MaxActivatingExamples
from sae_lens_dfc.analysis.report.findings import StageCount
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import (
    relative_decoder_differences,
    relative_decoder_norms,
)
from sae_lens_dfc.metrics.exclusivity.evidence import MIN_FIRINGS, LatentEvidence
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps

T = TypeVar("T")

CONTEXT_TOKENS = 48
"""Segments of text up to a firing that the models reread in a causal test."""


class Candidates(NamedTuple):
    """The latents to test, ordered by evidence of a difference, and the counts of each stage."""

    latents: list[int]
    stages: list[StageCount]
    order: list[int]
    """All latents that could be a difference, those to test first."""


@torch.no_grad()
def differences_made(
    crosscoder: Crosscoder,
    gathered: MaxActivatingExamples,
    own: tuple[Float[Tensor, "d_sae d_a"], Float[Tensor, "d_sae d_b"]],
    affine_maps: AffineMaps | None,
) -> Float[Tensor, " d_sae"]:
    """Size of the difference that each latent makes between the models in its top contexts: `f_top
    |d_b - d_a| * relative difference`.

    `f_top` is its mean activation in its top contexts, at most 20; the relative difference is that
    of `relative_decoder_differences`, 1 for a latent that only one model has. A latent with a large
    difference in a few places ranks before one with a small difference everywhere.

    Args:
        crosscoder: The saved crosscoder.
        gathered: Max-activating examples of all latents.
        own: Model-specific directions from `both_decoder_differences`.
        affine_maps: Affine maps between the models; none if both models share one basis.
    """
    strongest = gathered.strongest["activation"].to(crosscoder.device)
    top = strongest.sum(dim=1) / (strongest > 0).sum(dim=1).clamp(min=1)
    of_a, of_b = own
    # In units of the model in which the difference is larger, with both models normalized as in
    # training.
    scale = crosscoder.input_scale.to(of_a)
    made = torch.maximum(of_a.norm(dim=1) * scale[0], of_b.norm(dim=1) * scale[1])
    return (top * made * relative_decoder_differences(crosscoder, affine_maps)).cpu()


def candidates(
    evidence: LatentEvidence,
    gathered: MaxActivatingExamples,
    made: Float[Tensor, " d_sae"],
    keep: int,
    one_basis: bool,
) -> Candidates:
    """Narrow all latents down to those that are alive, those that could be a difference, and the
    first `keep` of these.

    Latents that are exclusive with evidence come first, ordered by size of the difference. If the
    models share no basis, shared latents are excluded: the difference of their decoders then
    depends on the map between the models.
    """
    counts = gathered.firing.counts.cpu()
    lives = counts >= MIN_FIRINGS
    could = lives & (torch.ones_like(lives) if one_basis else evidence.is_candidate.cpu())
    could &= made > 0
    order = made + evidence.is_exclusive.cpu() * (made.max() + 1)
    latents = [int(i) for i in order.argsort(descending=True) if could[i]]
    dropped = {
        "never fire on held-out text": int((counts == 0).sum()),
        f"fire fewer than {MIN_FIRINGS} times": int(((counts > 0) & ~lives).sum()),
    }
    why = "have equal decoders" if one_basis else "are not candidates"
    stages = [
        stage("alive", len(counts), dropped),
        stage("could be a difference", int(lives.sum()), {why: int((lives & ~could).sum())}),
        stage(
            f"first {keep} by evidence",
            len(latents),
            {"have less evidence": max(0, len(latents) - keep)},
        ),
    ]
    return Candidates(latents[:keep], stages, latents)


def stage(name: str, intake: int, dropped: Mapping[str, int]) -> StageCount:
    """Counts of a stage, omitting reasons for which no latent was dropped."""
    kept = {why: n for why, n in dropped.items() if n > 0}
    return StageCount(name, intake, intake - sum(kept.values()), kept)


def source_of(crosscoder: Crosscoder, latent: int) -> ModelName:
    """The source model of a latent: the one it is exclusive to, or for a shared latent B, unless
    its relative decoder norm exceeds 0.53.

    For a shared latent, ablating B's part in B and adding it to A is equivalent to adding A's part
    to B and ablating it in A.
    """
    partition = crosscoder.partition.name_of(latent)
    if partition == SHARED:
        return "a" if relative_decoder_norms(crosscoder)[latent] > 0.53 else "b"
    return "a" if partition == A_EXCLUSIVE else "b"


@torch.no_grad()
def control_directions(
    crosscoder: Crosscoder,
    acts: Float[Tensor, "n d_in"],
    lives: Bool[Tensor, " d_sae"],
    left_out: Sequence[int],
    n: int,
    seed: int,
) -> dict[str, dict[ModelName, Float[Tensor, "_ _"]]]:
    """Control directions: random ones with the covariance of each model's activations, and decoder
    directions of shared latents in each model.

    Args:
        crosscoder: The saved crosscoder.
        acts: Held-out activations.
        lives: Latents to sample from.
        left_out: Latents to exclude.
        n: Number of directions of each kind.
        seed: Random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    models = crosscoder.partition.models
    shared = torch.zeros(len(lives), dtype=torch.bool)
    shared[crosscoder.partition.slices[SHARED]] = True
    shared[list(left_out)] = False
    pool = (shared & lives.cpu()).nonzero()[:, 0]
    drawn = pool[torch.randperm(len(pool), generator=generator)[:n]]
    random: dict[ModelName, Tensor] = {}
    others: dict[ModelName, Tensor] = {}
    for m in ("a", "b"):
        random[m] = drawn_directions(acts[:, models[m]], n, generator)
        others[m] = crosscoder.W_dec.float()[drawn.to(crosscoder.device)][:, models[m]].cpu()
    kinds = {"random directions": random, "shared latents": others}
    return {kind: of_models for kind, of_models in kinds.items() if len(of_models["a"]) > 0}


def windows(
    pair: ModelPair, contexts: Sequence[Context], places: Sequence[FiringPosition]
) -> list[Segments]:
    """The last `WINDOW` segments of text up to each place, after the beginning-of-sequence
    segment."""
    found: list[Segments] = []
    for place in places:
        first = max(1, place.segment + 1 - CONTEXT_TOKENS)
        text = contexts[place.context].segments[first : place.segment + 1]
        found.append(text.after(pair.bos_segment))
    return found


def split(places: Sequence[T]) -> tuple[list[T], list[T]]:
    """Split examples alternately into those that describe a latent and those that test it, so that
    no text does both.

    >>> split([5, 4, 3, 2, 1])
    ([5, 3, 1], [4, 2])
    """
    return list(places[::2]), list(places[1::2])
