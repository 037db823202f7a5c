"""Defines the steering operations on a crosscoder's latents (add, scale, clamp, ablate), with
strengths in units of each latent's maximum activation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.options import OPERATIONS
from sae_lens_dfc.analysis.steering.hooks import Change
from sae_lens_dfc.analysis.steering.latent_acts import acts_of_one, latent_acts
from sae_lens_dfc.crosscoders.groups import EXCLUSIVE_TO
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import moved_decoders
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps

READS_FEATURE_ACTS = ("scale", "clamp", "ablate")
"""Operations that need the latent's activation at each position."""
MAXIMUM_READ = ("add", "clamp")
"""Operations whose strength is in units of the latent's maximum activation."""


@dataclass(frozen=True)
class LatentOperation:
    """One intervention on one latent. `f` is its activation, `f_max` its maximum activation on
    natural text, `s` the strength, `d` its decoder direction.

    - `add`: `x + s f_max d`, whether or not the latent fires (arXiv 2602.11729, appendix B.4.3);
    - `scale`: `x + (s - 1) f d`, multiplies its activation by `s`;
    - `clamp`: `x + (s f_max - f) d`, sets its activation to `s f_max`, whether or not it fires;
    - `ablate`: `x - f d`, removes its contribution.

    Raises:
        ValueError: The operation is unknown, the strength is not finite, or `ablate` is given one.
    """

    latent: int
    operation: str = "add"
    """Name of the operation."""
    strength: float | None = None
    """`s`; none for `ablate`."""

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(
                f"There is no operation {self.operation!r}. Choose from {', '.join(OPERATIONS)}."
            )
        if (self.operation == "ablate") != (self.strength is None):
            what_to_do = "Give one, such as 2." if self.strength is None else "Leave it out."
            raise ValueError(
                f"A strength goes with each operation but ablate, got {self.operation} and {self.strength}. {what_to_do}"
            )
        if not math.isfinite(self.strength or 0.0):
            raise ValueError(f"A strength must be a finite number, got {self.strength}.")

    def terms(self, max_activation: float) -> tuple[float, float]:
        """`p, q` such that `x` becomes `x + (p + q f) d`.

        >>> LatentOperation(7, "clamp", 0.5).terms(max_activation=4.0)
        (2.0, -1.0)
        """
        s = self.strength or 0.0
        return {
            "add": (s * max_activation, 0.0),
            "scale": (0.0, s - 1),
            "clamp": (s * max_activation, -1.0),
            "ablate": (0.0, -1.0),
        }[self.operation]


def latent_change(
    crosscoder: Crosscoder,
    model: ModelName,
    operations: Sequence[LatentOperation],
    max_activations: Float[Tensor, " d_sae"] | None = None,
    *,
    other: AffineMaps | Float[Tensor, " d_other"] | None = None,
    mapped_by: AffineMaps | None = None,
) -> Change:
    """A change for `steering.changed` that applies all operations at once, each to the unchanged
    activations.

    All operations but `add` need the latents' activations `f`. For a latent exclusive to this
    model, `f` depends on this model alone. For a shared latent it depends on both models, of which
    only one runs, so the caller provides `other`, a stand-in for the other model's activations: an
    affine map from this model's, or one vector for all tokens, such as their mean. The
    approximation is as good as the map; `latent_acts.explained_by` measures it.

    The crosscoder was not trained on first tokens, so `f` is meaningless there: exclude them with
    `positions_of(..., first=False)`.

    Args:
        crosscoder: The saved crosscoder.
        model: The one that is steered.
        operations: Operations, each on a different latent.
        max_activations: Each latent's maximum activation on natural text; for `add` and `clamp`.
        other: See above.
        mapped_by: Steer with the other model's decoder direction, moved by this map with its norm
            kept (`metrics.exclusivity.moved_decoders`), in place of this model's own; for `add`
            only.

    Raises:
        ValueError: A latent is out of range, given twice, has no decoder to steer with or no
            maximum activation; or `other` is not given for a shared latent.
    """
    check_operations(crosscoder, model, operations, mapped_by is not None)
    rows = _decoders(crosscoder, model, [o.latent for o in operations], mapped_by)
    constant, factor = _terms(operations, max_activations)
    code = _code(crosscoder, model, operations, other)

    def change(acts: Tensor) -> Tensor:
        amount = constant.to(acts.device)
        if code is not None:
            amount = amount + factor.to(acts.device) * code(acts.float())
        return acts + amount @ rows.to(acts.device)

    return change


def check_operations(
    crosscoder: Crosscoder, model: ModelName, operations: Sequence[LatentOperation], mapped: bool
) -> None:
    """Check that the operations are valid for this model, without looking at any activations.

    Args:
        crosscoder: The saved crosscoder.
        model: The one that is steered.
        operations: The operations.
        mapped: Whether to steer with the other model's decoders, moved by a map.

    Raises:
        ValueError: A latent is out of range, given twice, or has no decoder to steer with; or an
            operation other than `add` is combined with a map.
    """
    latents, d_sae = [o.latent for o in operations], crosscoder.cfg.d_sae
    if not latents or len(set(latents)) < len(latents) or not all(0 <= i < d_sae for i in latents):
        raise ValueError(
            f"Steering takes one or more different latents from 0 to {d_sae - 1}, got {latents}."
        )
    source = OTHER[model] if mapped else model
    lacking = EXCLUSIVE_TO[OTHER[source]]
    for o in operations:
        if crosscoder.partition.name_of(o.latent) == lacking:
            advice = (
                f"Steer model {model} with its own decoder, without a map"
                if mapped
                else f"Steer model {OTHER[model]}, or model {model} with the direction moved by a map (mapped_by; --map)"
            )
            raise ValueError(
                f"Latent {o.latent} is {lacking}: it has no decoder in model {source}. {advice}."
            )
        if mapped and o.operation in READS_FEATURE_ACTS:
            raise ValueError(
                f"{o.operation} of latent {o.latent} cannot use a map: it changes what the latent's own decoder writes, and model "
                f"{model} would be steered with the other model's. Use add."
            )


def needing_other_model(
    crosscoder: Crosscoder, model: ModelName, operations: Sequence[LatentOperation]
) -> list[int]:
    """The latents whose activation an operation needs and which depend on the other model too."""
    own = EXCLUSIVE_TO[model]
    name_of = crosscoder.partition.name_of
    return [
        o.latent
        for o in operations
        if o.operation in READS_FEATURE_ACTS and name_of(o.latent) != own
    ]


def _decoders(
    crosscoder: Crosscoder, model: ModelName, latents: Sequence[int], mapped_by: AffineMaps | None
) -> Float[Tensor, "n_latents d_model"]:
    if mapped_by is None:
        W_dec = crosscoder.W_dec[list(latents)].detach().float()
        rows = W_dec[:, crosscoder.partition.models[model]]
    else:
        to_b, to_a = moved_decoders(crosscoder, mapped_by.to(crosscoder.device), latents)
        rows = (to_b if model == "b" else to_a).detach()
    for latent, row in zip(latents, rows, strict=True):
        if not row.any() or not row.isfinite().all():
            raise ValueError(
                f"Latent {latent}'s direction in model {model} is zero or not finite: there is nothing to steer with. "
                "Choose another latent."
            )
    return rows


def _terms(
    operations: Sequence[LatentOperation], max_activations: Tensor | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    terms: list[tuple[float, float]] = []
    for o in operations:
        largest = 0.0 if max_activations is None else max_activations[o.latent].item()
        if o.operation in MAXIMUM_READ and not 0 < largest < math.inf:
            raise ValueError(
                f"Latent {o.latent} has no maximum activation to scale the strength by: it is "
                f"{'not given' if max_activations is None else f'{largest:g}'}. Choose a latent that fires, or give more text."
            )
        terms.append(o.terms(largest))
    constant, factor = torch.tensor(terms).T
    return constant, factor


def _code(
    crosscoder: Crosscoder,
    model: ModelName,
    operations: Sequence[LatentOperation],
    other: AffineMaps | Tensor | None,
) -> Callable[[Tensor], Tensor] | None:
    """Computes the latents' activations from the model's; none if no operation needs them."""
    if not any(o.operation in READS_FEATURE_ACTS for o in operations):
        return None
    if other is None:
        for latent in needing_other_model(crosscoder, model, operations):
            raise ValueError(
                f"The activation of latent {latent} is needed, but the latent is shared and model {model} alone does not determine it. "
                f"Give other (a map, or model {OTHER[model]}'s mean) for an approximation."
            )
        # The value does not matter: this model's exclusive latents have zero weights in the other
        # model.
        other = torch.zeros(crosscoder.cfg.d_b if model == "a" else crosscoder.cfg.d_a)
    stand_in, latents = other, [o.latent for o in operations]
    return lambda acts: latent_acts(crosscoder, acts_of_one(model, acts, stand_in), latents)
