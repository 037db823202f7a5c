"""The activations of some latents, and what can be said of them when one of the two models runs alone."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.activations import after_first_position
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.spread import variation
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments

Model = Literal["a", "b"]


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
    model: Model,
    acts: Float[Tensor, "*batch d_model"],
    other: Stitching | Float[Tensor, " d_other"],
) -> Float[Tensor, "*batch d_in"]:
    """One model's raw activations joined with what stands in for the other's: a map of them, or one vector."""
    if isinstance(other, Stitching):
        other = other.to(acts.device)
        guess = other.to_b(acts) if model == "a" else other.to_a(acts)
    else:
        guess = other.to(acts).expand(*acts.shape[:-1], -1)
    return torch.cat([acts, guess] if model == "a" else [guess, acts], dim=-1)


@torch.no_grad()
def paired_feature_acts(
    crosscoder: Crosscoder, pair: ModelPair, context: Segments, latents: Sequence[int]
) -> dict[Model, Float[Tensor, "1 _ n_latents"]]:
    """Latents' activations at each token of a text in either model, computed with both, as `latent_change` takes them.

    They are 0 at tokens without a partner, of which the crosscoder says nothing, and at a model's first token.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models.
        context: The text, e.g. `pair.segments(text)[0].after(pair.bos_segment)`.
        latents: Which.
    """
    [acts] = pair.activations([context])
    found = latent_acts(crosscoder, acts, latents).cpu()
    found[~after_first_position(context)] = 0
    return {
        "a": _at(context.last_a, found, len(context.ids_a)),
        "b": _at(context.last_b, found, len(context.ids_b)),
    }


def _at(
    positions: Int[np.ndarray, " n"], values: Float[Tensor, "n n_latents"], n_tokens: int
) -> Float[Tensor, "1 n_tokens n_latents"]:
    result = torch.zeros(1, n_tokens, values.shape[1])
    result[0, torch.from_numpy(positions)] = values
    return result


@torch.no_grad()
def explained_by(
    crosscoder: Crosscoder,
    model: Model,
    latents: Sequence[int],
    other: Stitching | Float[Tensor, " d_other"],
    batches: Iterable[Float[Tensor, "_ d_in"]],
) -> Float[Tensor, " n_latents"]:
    """How well latents' activations are told from one model and what stands in for the other: `1 - sum (f - g)^2 / sum (f - mean)^2`.

    `f` is computed with both models, `g` with one. 1 is as good as both; NaN for a latent that never fires, or always alike.

    Args:
        crosscoder: The saved crosscoder.
        model: The one that is read.
        latents: Which.
        other: What stands in for the other model, as in `latent_change`.
        batches: Both models' raw activations, of other text than a map was fitted to.
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
