"""Builds the steering directions of latents in both models, and random control directions with the
same norms."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName

T = TypeVar("T")

PROMPTS = ("What's on your mind?", "What do you want to talk about?", "Tell me something")
"""Open-ended questions for steered models (arXiv 2602.11729, section 3.2.2)."""
RANDOM = "random"
"""The group of the control directions."""


class Directions(NamedTuple):
    """A latent's steering vector in each model at strength 1: its direction times its maximum
    activation."""

    a: Float[Tensor, " d_a"]
    """In raw units of A's activations."""
    b: Float[Tensor, " d_b"]
    """In raw units of B's activations; for a latent without a direction in B, A's direction mapped
    by an affine map's matrix, without bias."""
    source: ModelName = "a"
    """The model that the latent belongs to; the test is whether the other model responds alike."""


def check_directions(
    pair: ModelPair, directions: Mapping[int, Directions], groups: Mapping[int, str]
) -> None:
    """Check that the models can be steered with these directions.

    Raises:
        ValueError: There is no latent, one has no group, or a direction has another width than its
            model, is not finite, or is zero in its source model.
    """
    if not directions:
        raise ValueError("There is no latent to steer with. Give directions of at least one.")
    for latent, given in directions.items():
        if latent not in groups or groups[latent] == RANDOM:
            raise ValueError(
                f"Latent {latent} needs a group other than {RANDOM!r}, such as its partition's name; "
                f"got {groups.get(latent)!r}. Name one in groups."
            )
        for name, model, vector in (("a", pair.a, given.a), ("b", pair.b, given.b)):
            if vector.shape != (model.d_model,) or not vector.isfinite().all():
                raise ValueError(
                    f"Latent {latent}'s direction in model {name} must be {model.d_model} finite numbers; got shape "
                    f"{tuple(vector.shape)}. Give the row of W_dec that belongs to the model, or its mapped direction."
                )
        if not (given.a if given.source == "a" else given.b).any():
            raise ValueError(
                f"Latent {latent}'s direction in its source model {given.source} is zero: it does not fire, or has no "
                "decoder there. Leave it out, or name the other model as its source."
            )


def random_directions(like: Sequence[Directions], n: int, seed: int) -> list[Directions]:
    """Pairs of independent random directions, uniform on the sphere, with the norms of the latents'
    directions taken in turn.

    >>> given = [Directions(torch.tensor([3.0, 4.0]), torch.tensor([2.0]))]
    >>> [control] = random_directions(given, n=1, seed=0)
    >>> round(control.a.norm().item(), 3), round(control.b.norm().item(), 3)
    (5.0, 2.0)
    """
    generator = torch.Generator().manual_seed(seed)

    def one(vector: Tensor) -> Float[Tensor, " d_model"]:
        drawn = torch.randn(vector.shape, generator=generator)
        return drawn / drawn.norm() * vector.float().norm().cpu()

    taken = [like[i * len(like) // n] for i in range(n)]
    return [Directions(one(d.a), one(d.b), d.source) for d in taken]


def by_group(
    latents: Mapping[int, T], groups: Mapping[int, str], random: Sequence[T]
) -> dict[str, list[T]]:
    """The latents' results by group, in order, and those of the random directions if any.

    >>> by_group({4: "x", 7: "y", 9: "z"}, {4: "shared", 7: "a_exclusive", 9: "shared"}, ["r"])
    {'shared': ['x', 'z'], 'a_exclusive': ['y'], 'random': ['r']}
    """
    members: dict[str, list[T]] = {}
    for latent, value in latents.items():
        members.setdefault(groups[latent], []).append(value)
    return {**members, RANDOM: list(random)} if random else members
