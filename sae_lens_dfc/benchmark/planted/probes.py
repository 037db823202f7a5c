"""What the crosscoders of one organism are scored on, and how well their latents tell it apart."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.benchmark.planted.behaviours import Items
from sae_lens_dfc.benchmark.planted.causal import Prepared, Reading, preferences, prepared
from sae_lens_dfc.benchmark.planted.organism import Organism
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.stitching import Stitching, fit_stitching
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair


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
    stitching: Stitching | None
    """How A's directions move to B; none where the two have one basis."""

    @classmethod
    def of(cls, pair: ModelPair, organism: Organism, rows: Float[Tensor, "n d_in"]) -> "Probes":
        """Run both models over the prompts for discovery and for the test."""
        discovery, test = (Probe.of(pair, organism.items[s]) for s in ("discovery", "test"))
        one_basis = pair.d_a == pair.d_b
        stitching = None if one_basis else fit_stitching(PairMoments.of(rows.split(4096)), pair.d_a)
        return cls(discovery, test, rows, stitching)


@torch.no_grad()
def activations(crosscoder: Crosscoder, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Each latent's activation at each row."""
    return torch.cat([crosscoder.encode(batch) for batch in rows.split(4096)])


def auc(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Area under the ROC curve of each column: the chance that a positive is above a negative, a tie being half.

    >>> auc(torch.tensor([[3.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([0.8750])
    """
    above = positive[:, None] > negative[None]
    ties = positive[:, None] == negative[None]
    return (above + 0.5 * ties).mean(dim=(0, 1))


def auc_bound(area: Float[Tensor, " d"], n_positive: int, n_negative: int) -> Float[Tensor, " d"]:
    """What an area under the curve is at least, at 95 %: less 1.64 standard errors (Hanley & McNeil 1982).

    >>> auc_bound(torch.tensor([0.85, 1.0]), 24, 24)
    tensor([0.7569, 1.0000])
    """
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n_positive - 1) * (q1 - area**2)
    variance = (variance + (n_negative - 1) * (q2 - area**2)) / (n_positive * n_negative)
    return area - 1.64 * variance.clamp(min=0).sqrt()


def prompt_acts(crosscoder: Crosscoder, read: Prepared) -> Float[Tensor, "n_items d_sae"]:
    """Each latent's largest activation over the positions of a prompt."""
    feature_acts = activations(crosscoder, read.rows)
    own = [feature_acts[read.text == i].amax(dim=0) for i in range(read.n_items)]
    return torch.stack(own)


def detection(crosscoder: Crosscoder, probe: Probe) -> Float[Tensor, " d_sae"]:
    """How well each latent tells prompts for the behaviour from controls, as an area under the ROC curve."""
    return auc(prompt_acts(crosscoder, probe.behaviour), prompt_acts(crosscoder, probe.control))
