"""From all latents to a short list of differences, each tested by its cause; every stage counts what comes in and goes out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.contexts import Context
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, SHARED
from sae_lens_dfc.findings import StageCount
from sae_lens_dfc.gathering import Gathered, Place
from sae_lens_dfc.metrics.claims import MIN_FIRINGS, LatentEvidence
from sae_lens_dfc.metrics.exclusivity import relative_decoder_differences, relative_decoder_norms
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.metrics.verification import (
    Source,
    drawn_directions,
)
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments

T = TypeVar("T")

N_TOP = 20
"""Contexts in which a latent is strongest."""
WINDOW = 48
"""Segments of text before a firing that the models read again when it is tested."""


class Candidates(NamedTuple):
    """The latents to test, the most evidence of a difference first, and what became of all others."""

    latents: list[int]
    stages: list[StageCount]


@torch.no_grad()
def differences_made(
    crosscoder: Crosscoder,
    gathered: Gathered,
    own: tuple[Float[Tensor, "d_sae d_a"], Float[Tensor, "d_sae d_b"]],
    stitching: Stitching | None,
) -> Float[Tensor, " d_sae"]:
    """How large a difference between the models each latent makes where it is strong: `f_top |d_b - d_a| * relative difference`.

    `f_top` is the mean of its activations in the contexts where it is strongest, 20 at the most; the relative difference is that of
    `relative_decoder_differences`, 1 for what one model alone has. A latent that is large in a few places goes before one
    that is a little different everywhere.

    Args:
        crosscoder: The saved crosscoder.
        gathered: Its firings.
        own: Each model's own part, as `both_decoder_differences` gives it.
        stitching: How a direction moves; none where both models have one basis.
    """
    strongest = gathered.strongest["activation"][:, :N_TOP].to(crosscoder.device)
    top = strongest.sum(dim=1) / (strongest > 0).sum(dim=1).clamp(min=1)
    of_a, of_b = own
    # In the model's units that it is large in, on the scale that both had in training.
    scale = crosscoder.input_scale.to(of_a)
    made = torch.maximum(of_a.norm(dim=1) * scale[0], of_b.norm(dim=1) * scale[1])
    return (top * made * relative_decoder_differences(crosscoder, stitching)).cpu()


def candidates(
    evidence: LatentEvidence,
    gathered: Gathered,
    made: Float[Tensor, " d_sae"],
    keep: int,
    one_basis: bool,
) -> Candidates:
    """All latents, then those that live, then those that could be a difference, then the first `keep` of these.

    Those called exclusive with evidence go first, the larger difference before the smaller. Where the models have no basis in
    common, shared latents are left out: how far their decoders differ is then a matter of the map between the models.
    """
    counts = gathered.firing.counts.cpu()
    lives = counts >= MIN_FIRINGS
    could = lives & (torch.ones_like(lives) if one_basis else evidence.is_candidate.cpu())
    could &= made > 0
    order = made + evidence.is_exclusive.cpu() * (made.max() + 1)
    latents = [int(i) for i in order.argsort(descending=True) if could[i]]
    dropped = {
        "never fires on held-out text": int((counts == 0).sum()),
        f"fires less than {MIN_FIRINGS} times": int(((counts > 0) & ~lives).sum()),
    }
    why = "its decoders do not differ" if one_basis else "both models have it"
    stages = [
        stage("alive", len(counts), dropped),
        stage("could be a difference", int(lives.sum()), {why: int((lives & ~could).sum())}),
        stage(
            f"first {keep} by evidence",
            len(latents),
            {"less evidence": max(0, len(latents) - keep)},
        ),
    ]
    return Candidates(latents[:keep], stages)


def stage(name: str, intake: int, dropped: Mapping[str, int]) -> StageCount:
    """What a stage let through, with no reasons for which nothing was dropped."""
    kept = {why: n for why, n in dropped.items() if n > 0}
    return StageCount(name, intake, intake - sum(kept.values()), kept)


def source_of(crosscoder: Crosscoder, latent: int) -> Source:
    """The model whose own part of a latent is looked at: that which has it, or of a shared one B unless it is stronger in A.

    Of a shared latent taking B's part from B and adding it to A are the same as adding A's to B and taking it from A.
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
) -> dict[str, dict[Source, Float[Tensor, "_ _"]]]:
    """Random directions with the covariance of each model's activations, and what shared latents write into each model.

    Args:
        crosscoder: The saved crosscoder.
        acts: Held-out activations.
        lives: Latents to draw from.
        left_out: Latents that are not drawn.
        n: Of each kind.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    models = crosscoder.partition.models
    shared = torch.zeros(len(lives), dtype=torch.bool)
    shared[crosscoder.partition.slices[SHARED]] = True
    shared[list(left_out)] = False
    pool = (shared & lives.cpu()).nonzero()[:, 0]
    drawn = pool[torch.randperm(len(pool), generator=generator)[:n]]
    random: dict[Source, Tensor] = {}
    others: dict[Source, Tensor] = {}
    for m in ("a", "b"):
        random[m] = drawn_directions(acts[:, models[m]], n, generator)
        others[m] = crosscoder.W_dec.float()[drawn.to(crosscoder.device)][:, models[m]].cpu()
    kinds = {"random directions": random, "shared latents": others}
    return {kind: of_models for kind, of_models in kinds.items() if len(of_models["a"]) > 0}


def windows(
    pair: ModelPair, contexts: Sequence[Context], places: Sequence[Place]
) -> list[Segments]:
    """The text up to each place, `WINDOW` segments of it, after the pair's start."""
    found: list[Segments] = []
    for place in places:
        first = max(1, place.segment + 1 - WINDOW)
        text = contexts[place.context].segments[first : place.segment + 1]
        found.append(text.after(pair.bos_segment))
    return found


def split(places: Sequence[T]) -> tuple[list[T], list[T]]:
    """Those to describe a latent by, and those to test it on: every other one, so that no text does both.

    >>> split([5, 4, 3, 2, 1])
    ([5, 3, 1], [4, 2])
    """
    return list(places[::2]), list(places[1::2])
