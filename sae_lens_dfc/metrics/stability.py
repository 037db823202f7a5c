"""Stability: whether two trainings find the same latents and put them in the same partition."""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.core.identity import PROVENANCE
from sae_lens_dfc.crosscoders.groups import SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import decoder_norms
from sae_lens_dfc.metrics.exclusivity.decoders import MIN_COSINE

LATENTS_PER_PRODUCT = 4096
UNRELATED = -2.0
"""Similarity of two latents that use no model in common, below every cosine."""


@torch.no_grad()
def stability(one: Crosscoder, other: Crosscoder) -> dict[str, float]:
    """Fraction of one crosscoder's latents that have a match in another, and whether matches are in
    the same partition.

    Two latents match if they are mutual nearest neighbors with similarity above 0.8. The similarity
    is the minimum cosine of their decoders over the models that both use. Only decoders are
    compared, so a latent may match one of another partition.

    Args:
        one: A crosscoder.
        other: Another of the same two models, with another seed, architecture or size.

    Returns:
        For each non-empty partition of `one`: `stability/matched/…`, the fraction of its latents
            that have a match; `stability/agreement/…`, the fraction of these whose match lies in
            the same partition; and `stability/chance/…`, the agreement expected by chance, if
            partitions were assigned at random among the other's latents that use a model in common.

    Raises:
        ValueError: The two crosscoders are of different models.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=9, d_sae=4, d_a=4, d_b=5))
    >>> stability(crosscoder, crosscoder)
    {'stability/matched/shared': 1.0, 'stability/agreement/shared': 1.0, 'stability/chance/shared': 1.0}
    """
    check_same_models([one, other])
    if (one.cfg.d_a, one.cfg.d_b) != (other.cfg.d_a, other.cfg.d_b):
        raise ValueError(
            f"Crosscoders of widths {one.cfg.d_a} + {one.cfg.d_b} and {other.cfg.d_a} + {other.cfg.d_b} have no common "
            "latents. Give runs on the same two models."
        )
    forward, backward = closest(one, other), closest(other, one)
    mutual = backward[forward] == torch.arange(len(forward), device=forward.device)
    matched = mutual & (forward >= 0)
    result: dict[str, float] = {}
    for name, latents in one.partition.slices.items():
        if one.partition.sizes[name] == 0:
            continue
        there = other.partition.slices[name]
        own = forward[latents][matched[latents]]
        result[f"stability/matched/{name}"] = matched[latents].double().mean().item()
        if len(own) > 0:
            agreed = (own >= there.start) & (own < there.stop)
            sizes = other.partition.sizes
            possible = sizes if name == SHARED else {n: sizes[n] for n in (name, SHARED)}
            result[f"stability/agreement/{name}"] = agreed.double().mean().item()
            result[f"stability/chance/{name}"] = possible[name] / sum(possible.values())
    return result


def check_same_models(crosscoders: Sequence[Crosscoder]) -> None:
    """Check that crosscoders were trained on the same models, as far as they record them.

    Raises:
        ValueError: Two differ; the message names the model.
    """
    first = crosscoders[0].cfg.metadata
    for other in crosscoders[1:]:
        for which in ("model_a", "model_b"):
            one, two = first.get(which), other.cfg.metadata.get(which)
            if one and two and any(one[k] != two.get(k) for k in one if k not in PROVENANCE):
                raise ValueError(
                    f"These crosscoders are of different models: {which} is {one} in one and {two} in another. "
                    "Give runs on the same two models and hooks."
                )


def stability_over_pairs(crosscoders: Sequence[Crosscoder]) -> dict[str, list[float]]:
    """The metrics of each pair of several crosscoders, matching the earlier one's latents in the
    later one."""
    values: dict[str, list[float]] = {}
    for one, other in combinations(crosscoders, 2):
        for name, value in stability(one, other).items():
            values.setdefault(name, []).append(value)
    return values


def closest(one: Crosscoder, other: Crosscoder) -> Int[Tensor, " d_sae_one"]:
    """For each latent of `one` the nearest of `other`; -1 if none exceeds `MIN_COSINE`."""
    found = [
        _similarity(one, other, slice(start, start + LATENTS_PER_PRODUCT)).max(dim=1)
        for start in range(0, one.cfg.d_sae, LATENTS_PER_PRODUCT)
    ]
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.where(values > MIN_COSINE, indices, -1)


def _similarity(
    one: Crosscoder, other: Crosscoder, latents: slice
) -> Float[Tensor, "chunk d_sae_other"]:
    uses, others_use = (decoder_norms(c.W_dec, c.partition) > 0 for c in (one, other))
    lowest = one.W_dec.new_full((len(one.W_dec[latents]), len(other.W_dec)), UNRELATED)
    for i, inputs in enumerate(one.partition.models.values()):
        theirs = normalize(other.W_dec[:, inputs]).to(one.W_dec)
        cosine = normalize(one.W_dec[latents, inputs]) @ theirs.T
        both = uses[i, latents, None] & others_use[i].to(uses.device)
        # Ignore a model that one of the two latents does not use.
        known = torch.where(lowest == UNRELATED, cosine, torch.minimum(lowest, cosine))
        lowest = torch.where(both, known, lowest)
    return lowest
