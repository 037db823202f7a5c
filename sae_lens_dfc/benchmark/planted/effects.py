"""An effect on some prompts beside the same change made in random directions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.benchmark.planted.causal import KINDS, random_directions
from sae_lens_dfc.metrics.effects import interval, limit

N_CONTROLS = 20
"""Random directions of each kind."""
Effect = Callable[[Float[Tensor, " d"]], Float[Tensor, " n_items"]]
"""What a direction does, for each prompt."""


def alone(values: Float[Tensor, " n_items"]) -> dict[str, Any]:
    """The `mean` of an effect over prompts and its `interval`."""
    return {"mean": float(values.mean()), "interval": list(interval(values))}


def beside_random(
    effect: Effect,
    direction: Float[Tensor, " d"],
    rows: Float[Tensor, "n d"],
    seed: int,
    others: Float[Tensor, "k d"],
    with_controls: bool = True,
) -> dict[str, Any]:
    """A direction's effect and that of other ones of the same norm: random, of each kind, and other latents'.

    Args:
        effect: What a direction does.
        direction: The one in question.
        rows: Activations whose covariance the second kind is drawn with.
        seed: Of the draws.
        others: What other latents write into B beyond what they write into A.
        with_controls: Whether to make the change in random directions too; without them nothing is `beyond`.

    Returns:
        `mean` and its `interval`, the means of each kind of control, and whether the effect is `beyond` the
        95th percentile of every kind. `other_latents` are the means of theirs, and `beyond_others` compares with them: no part
        of the verdict, since in a pair that differs in nothing but what was planted others may well write some of it.
        Without a positive mean the controls, which cannot change the verdict, are left out.
    """
    values = effect(direction)
    result: dict[str, Any] = {**alone(values), "controls": {}, "other_latents": []}
    if with_controls and result["mean"] > 0:
        for kind in KINDS:
            drawn = random_directions(kind, N_CONTROLS, direction.norm(), rows, seed)
            result["controls"][kind] = [float(effect(one).mean()) for one in drawn]
        as_long = others / others.norm(dim=-1, keepdim=True) * direction.norm()
        result["other_latents"] = [float(effect(one).mean()) for one in as_long]
    result["beyond"] = is_beyond(result["mean"], result["controls"])
    beside = {"others": result["other_latents"]} if result["other_latents"] else {}
    result["beyond_others"] = is_beyond(result["mean"], beside)
    return result


def is_beyond(mean: float, controls: Mapping[str, list[float]]) -> bool:
    """Whether a mean is above the 95th percentile of every kind of control, of which there is one.

    >>> is_beyond(1.0, {"isotropic": [0.0, 0.5]}), is_beyond(1.0, {"isotropic": [0.0, 2.0]}), is_beyond(1.0, {})
    (True, False, False)
    """
    limits = [limit(torch.tensor(values)) for values in controls.values()]
    return bool(limits) and all(mean > one for one in limits)
