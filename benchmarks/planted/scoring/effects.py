"""Compares an effect on prompts with the effects of random directions of the same norm."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.planted.scoring.patching import KINDS, control_directions
from sae_lens_dfc.stats.significance import interval, limit

N_CONTROLS = 20
"""Number of random directions of each kind."""
PlantedEffect = Callable[[Float[Tensor, " d"]], Float[Tensor, " n_items"]]
"""Maps a direction to its effect on each prompt."""


def alone(values: Float[Tensor, " n_items"]) -> dict[str, Any]:
    """The `mean` of an effect over prompts and its `interval`."""
    return {"mean": float(values.mean()), "interval": list(interval(values))}


def beside_random(
    effect: PlantedEffect,
    direction: Float[Tensor, " d"],
    rows: Float[Tensor, "n d"],
    seed: int,
    others: Float[Tensor, "k d"],
    with_controls: bool = True,
) -> dict[str, Any]:
    """A direction's effect and those of control directions of the same norm: random ones of each
    kind, and other latents'.

    Args:
        effect: Maps a direction to its effect on each prompt.
        direction: The direction to test.
        rows: Activations whose covariance the second kind of random directions has.
        seed: Random seed.
        others: Model-specific directions of other latents: decoder in B minus decoder in A.
        with_controls: Whether to test random directions too; without them nothing is `beyond`.

    Returns:
        `mean` and its `interval`, the means of each kind of control, and whether the effect is
        `beyond` the 95th percentile of every kind. `other_latents` holds the other latents' means,
        and `beyond_others` compares with them; it is not part of the verdict, because in a pair
        that differs only in what was planted, other latents may encode part of it. If the mean is
        not positive, controls are skipped, since they cannot change the verdict.
    """
    values = effect(direction)
    result: dict[str, Any] = {**alone(values), "controls": {}, "other_latents": []}
    if with_controls and result["mean"] > 0:
        for kind in KINDS:
            drawn = control_directions(kind, N_CONTROLS, direction.norm(), rows, seed)
            result["controls"][kind] = [float(effect(one).mean()) for one in drawn]
        as_long = others / others.norm(dim=-1, keepdim=True) * direction.norm()
        result["other_latents"] = [float(effect(one).mean()) for one in as_long]
    result["beyond"] = is_beyond(result["mean"], result["controls"])
    beside = {"others": result["other_latents"]} if result["other_latents"] else {}
    result["beyond_others"] = is_beyond(result["mean"], beside)
    return result


def is_beyond(mean: float, controls: Mapping[str, list[float]]) -> bool:
    """Whether a mean exceeds the 95th percentile of every kind of control; false without controls.

    >>> is_beyond(1.0, {"isotropic": [0.0, 0.5]}), is_beyond(1.0, {"isotropic": [0.0, 2.0]}), is_beyond(1.0, {})
    (True, False, False)
    """
    limits = [limit(torch.tensor(values)) for values in controls.values()]
    return bool(limits) and all(mean > one for one in limits)
