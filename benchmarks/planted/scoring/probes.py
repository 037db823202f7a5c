"""Prepares the prompts and activations on which an organism's crosscoders are scored, and computes
their latents' detection AUROC."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.planted.scoring.patching import (
    PatchedReading,
    Prepared,
    preferences,
    prepared,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.organisms.behaviors import Items
from sae_lens_dfc.organisms.organism import Organism
from sae_lens_dfc.stats.affine_maps import AffineMaps, fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments


class Side(NamedTuple):
    """One model on prompts, with its unpatched preferences."""

    model: HookedModel
    reading: PatchedReading
    before: Float[Tensor, " n_items"]

    @classmethod
    def of(cls, model: HookedModel, reading: PatchedReading) -> "Side":
        return cls(model, reading, preferences(model, reading, reading.acts))

    def rise(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " n_items"]:
        """Increase of the preference for the behavior with these activations, for each prompt."""
        return preferences(self.model, self.reading, acts) - self.before


class Probe(NamedTuple):
    """The prompts of one split, as read by both models."""

    behavior: Prepared
    control: Prepared
    behavior_b: Side
    """Model B on triggering prompts, where ablation should lower the preference for the
    behavior."""
    control_b: Side
    """Model B on controls, where addition should raise it."""
    control_a: Side
    """Model A on controls."""

    @classmethod
    def of(cls, pair: ModelPair, items: Items) -> "Probe":
        behavior, control = (prepared(pair, kind) for kind in items)
        return cls(
            behavior,
            control,
            Side.of(pair.b, behavior.b),
            Side.of(pair.b, control.b),
            Side.of(pair.a, control.a),
        )


@dataclass(frozen=True)
class Probes:
    """All data on which the crosscoders of one organism are scored."""

    discovery: Probe
    test: Probe
    rows: Float[Tensor, "n d_in"]
    """Training rows."""
    affine_maps: AffineMaps | None
    """Affine map from A to B; none if the two share one basis."""

    @classmethod
    def of(cls, pair: ModelPair, organism: Organism, rows: Float[Tensor, "n d_in"]) -> "Probes":
        """Run both models on the discovery and test prompts."""
        discovery, test = (Probe.of(pair, organism.items[s]) for s in ("discovery", "test"))
        one_basis = pair.d_a == pair.d_b
        affine_maps = (
            None if one_basis else fit_affine_maps(PairMoments.of(rows.split(4096)), pair.d_a)
        )
        return cls(discovery, test, rows, affine_maps)


@torch.no_grad()
def activations(crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Each latent's activation on each row."""
    return torch.cat([crosscoder.encode(batch) for batch in rows.split(4096)])


def auroc(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """AUROC of each column: the probability that a positive exceeds a negative, counting ties as
    one half.

    >>> auroc(torch.tensor([[3.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([0.8750])
    """
    above = positive[:, None] > negative[None]
    ties = positive[:, None] == negative[None]
    return (above + 0.5 * ties).mean(dim=(0, 1))


def auc_bound(area: Float[Tensor, " d"], n_positive: int, n_negative: int) -> Float[Tensor, " d"]:
    """Lower 95 % confidence bound of an AUROC: 1.64 standard errors below it (Hanley & McNeil
    1982).

    >>> auc_bound(torch.tensor([0.85, 1.0]), 24, 24)
    tensor([0.7569, 1.0000])
    """
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n_positive - 1) * (q1 - area**2)
    variance = (variance + (n_negative - 1) * (q2 - area**2)) / (n_positive * n_negative)
    return area - 1.64 * variance.clamp(min=0).sqrt()


def prompt_acts(crosscoder: Crosscoder, read: Prepared) -> Float[Tensor, "n_items d_sae"]:
    """Each latent's maximum activation over the positions of a prompt."""
    feature_acts = activations(crosscoder, read.rows)
    own = [feature_acts[read.text == i].amax(dim=0) for i in range(read.n_items)]
    return torch.stack(own)


def detection(crosscoder: Crosscoder, probe: Probe) -> Float[Tensor, " d_sae"]:
    """AUROC of each latent for separating triggering prompts from controls."""
    return auroc(prompt_acts(crosscoder, probe.behavior), prompt_acts(crosscoder, probe.control))
