"""Computes the activations of selected latents, from both models or approximately from one of
them."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.metrics.evaluation_data import regrouped
from sae_lens_dfc.metrics.sparsity import ActivationStats
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps, affine_map_quality, fit_affine_maps
from sae_lens_dfc.stats.jackknife import variation
from sae_lens_dfc.stats.moments import PairMoments

logger = logging.getLogger(__name__)


TESTED_EVERY = 5
"""Every n-th batch of pairs is held out to test the affine map fitted to the others."""


def latent_acts(
    crosscoder: Crosscoder, acts: Float[Tensor, "*batch d_in"], latents: Sequence[int]
) -> Float[Tensor, "*batch n_latents"]:
    """`crosscoder.encode(acts)[..., latents]`, without computing the others."""
    here = torch.tensor(latents, dtype=torch.long, device=crosscoder.device)
    W_enc, b_enc, threshold = (
        x.detach()[..., here] for x in (crosscoder.W_enc, crosscoder.b_enc, crosscoder.threshold)
    )
    hidden_pre = crosscoder.process_sae_in(acts.to(crosscoder.device)) @ W_enc + b_enc
    return (
        (crosscoder.activation_fn(hidden_pre) * (hidden_pre > threshold)).detach().to(acts.device)
    )


def acts_of_one(
    model: ModelName,
    acts: Float[Tensor, "*batch d_model"],
    other: AffineMaps | Float[Tensor, " d_other"],
) -> Float[Tensor, "*batch d_in"]:
    """Concatenate one model's raw activations with a stand-in for the other's: an affine
    prediction, or one vector."""
    if isinstance(other, AffineMaps):
        other = other.to(acts.device)
        guess = other.to_b(acts) if model == "a" else other.to_a(acts)
    else:
        guess = other.to(acts).expand(*acts.shape[:-1], -1)
    return torch.cat([acts, guess] if model == "a" else [guess, acts], dim=-1)


@torch.no_grad()
def explained_by(
    crosscoder: Crosscoder,
    model: ModelName,
    latents: Sequence[int],
    other: AffineMaps | Float[Tensor, " d_other"],
    batches: Iterable[Float[Tensor, "_ d_in"]],
) -> Float[Tensor, " n_latents"]:
    """Variance of the latents' activations explained when they are computed from one model and a
    stand-in for the other: `1 - sum (f - g)^2 / sum (f - mean)^2`.

    `f` is computed from both models, `g` from one. 1 is as good as both; NaN for a latent whose
    activation never varies.

    Args:
        crosscoder: The saved crosscoder.
        model: The model whose activations are used.
        latents: Which.
        other: Stand-in for the other model, as in `latent_change`.
        batches: Both models' raw activations, on text that the map was not fitted to.
    """
    n, total, squares, error = 0, *torch.zeros(3, len(latents), dtype=torch.double)
    for acts in batches:
        f = latent_acts(crosscoder, acts, latents).cpu().double()
        own = acts[:, crosscoder.partition.models[model]].float()
        g = latent_acts(crosscoder, acts_of_one(model, own, other), latents)
        n += len(acts)
        total += f.sum(dim=0)
        squares += f.pow(2).sum(dim=0)
        error += (f - g.cpu()).pow(2).sum(dim=0)
    varies = variation(n, total, squares)
    return (1 - error / varies).where(varies > 0, torch.nan).float()


@torch.no_grad()
def largest_activations(
    crosscoder: Crosscoder, rows: Sequence[PairedRows]
) -> Float[Tensor, " d_sae"]:
    """Each latent's largest activation on these rows; 0 where it does not fire."""
    firing = ActivationStats(crosscoder.partition)
    for batch in rows:
        firing.update(crosscoder.encode(batch.acts.to(crosscoder.device)))
    return firing.maxima


class FittedMap(NamedTuple):
    """Affine maps between the models, and held-out pairs that they were not fitted to."""

    affine_maps: AffineMaps
    others: list[Float[Tensor, "_ d_in"]]


def fitted_map(rows: Sequence[PairedRows], d_a: int) -> FittedMap:
    """Fit affine maps to four fifths of the contexts, and log the variance they explain on the
    remaining fifth.

    Raises:
        ValueError: There are too few contexts to fit on some and test on others.
    """
    batches = [batch.acts for batch in regrouped(rows)]
    if len(batches) < 2:
        raise ValueError(
            "Fitting and testing an affine map needs more than one context. Give more text (--eval-pairs, --dataset)."
        )
    others = batches[::TESTED_EVERY]
    fitted = PairMoments.of(b for i, b in enumerate(batches) if i % TESTED_EVERY)
    affine_maps = fit_affine_maps(fitted, d_a)
    quality = affine_map_quality(affine_maps, PairMoments.of(others))
    logger.info(
        f"Affine maps between the models, fitted to {fitted.n:,} held-out pairs. On other held-out pairs they explain "
        f"{quality['affine_map/a_to_b']:.1%} of B's variance from A and {quality['affine_map/b_to_a']:.1%} of A's from B"
    )
    return FittedMap(affine_maps, others)
