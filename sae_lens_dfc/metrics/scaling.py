"""Latent scaling: whether the other model's activations hold a latent's direction after all."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity import moved_decoders
from sae_lens_dfc.metrics.spread import Estimate, Jackknife, Sums, variation
from sae_lens_dfc.metrics.stitching import Stitching


@torch.no_grad()
def owned_by_a(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Whether model A is where a latent is stronger: its *source*; the other model is its *target*."""
    norms = crosscoder.decoder_norms()
    return norms[0] >= norms[1]


@torch.no_grad()
def directions(crosscoder: Crosscoder, stitching: Stitching | None) -> Float[Tensor, "d_sae d_in"]:
    """Each latent's decoder in its source and the same direction in its target, joined on the last axis, in raw units.

    Args:
        crosscoder: The saved crosscoder.
        stitching: How a direction moves to the target, and keeps its length there; see `moved_decoders`.

    Raises:
        ValueError: Without a map the two widths differ.
    """
    is_a = owned_by_a(crosscoder)[:, None]
    in_a, in_b = (crosscoder.W_dec.float()[:, m] for m in crosscoder.partition.models.values())
    a_in_b, b_in_a = moved_decoders(crosscoder, stitching)
    return torch.cat([torch.where(is_a, in_a, b_in_a), torch.where(is_a, a_in_b, in_b)], dim=-1)


@dataclass
class LatentScaling:
    """By how much each latent's direction is in the target model's error and in its reconstruction (arXiv 2504.02922).

    With `f` a latent's activation and `d_m` its direction in model m, the least squares solution of `f beta d_m = y_m` is

        beta = cov(f, <d_m, y_m>) / (|d_m|^2 var(f))

    With `y` the reconstruction error with the latent's own contribution put back, `nu_error` is the target's beta over the
    source's: near 1 the target has the direction and the crosscoder left it out there (complete shrinkage). With `y` the
    reconstruction, `nu_reconstruction` is: near 1 the direction is rebuilt in the target, by other latents (latent
    decoupling) or, where it has a decoder there, by itself. Both are near 0 for a latent that its source has alone. A
    map that is not exact moves a direction beside where it belongs, and lowers both for every latent.

    The paper has `sum f <d, y> / (|d|^2 sum f^2)`, a regression without an intercept. An activation is never negative, so
    there any constant part of `y` along `d` counts as the latent's, and a model's mean may be most of its
    activations; sparse latents and centred activations make the two alike.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, d_a=1, d_b=1))
    >>> crosscoder.W_enc.data, crosscoder.W_dec.data = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    >>> scaling = LatentScaling(crosscoder, torch.ones(1, 2))
    >>> acts = torch.tensor([[1.0, 9.5], [2.0, 10.0]])  # B has half of it, and the crosscoder does not say so
    >>> scaling.update(acts, crosscoder.encode(acts), crosscoder(acts))
    >>> {name: nu.value.item() for name, nu in scaling.estimates().items()}
    {'nu_error': 0.5, 'nu_reconstruction': 0.0}

    Args:
        crosscoder: The saved crosscoder.
        directions: Each latent's direction in both models, joined on the last axis, in raw units; see `directions`.
    """

    crosscoder: Crosscoder
    directions: Float[Tensor, "d_sae d_in"]
    _nu: Jackknife = field(init=False)

    @torch.no_grad()
    def __post_init__(self) -> None:
        crosscoder, models = self.crosscoder, self.crosscoder.partition.models.values()
        D, W_dec = self.directions.double(), crosscoder.W_dec.double()
        squares = torch.stack([D[:, m].pow(2).sum(dim=-1) for m in models])
        own = torch.stack([(D[:, m] * W_dec[:, m]).sum(dim=-1) for m in models]) / squares
        is_a = owned_by_a(crosscoder)

        def nu(sums: Sums) -> dict[str, Tensor]:
            varies = variation(sums["n"], sums["f"], sums["squares"])
            fit = {
                name: (sums[name] - sums["f"] * sums[f"{name} sum"] / sums["n"])
                / (squares * varies.where(varies > 0, torch.nan))
                for name in ("error", "reconstruction")
            }
            betas = {"error": fit["error"] + own, "reconstruction": fit["reconstruction"]}
            return {
                f"nu_{name}": torch.where(is_a, beta[1] / beta[0], beta[0] / beta[1])
                for name, beta in betas.items()
            }

        self._nu = Jackknife(nu)

    @torch.no_grad()
    def update(
        self,
        acts: Float[Tensor, "batch d_in"],
        feature_acts: Float[Tensor, "batch d_sae"],
        rebuilt: Float[Tensor, "batch d_in"],
    ) -> None:
        """Count a batch of raw activations, their code and its reconstruction in."""
        if len(acts) == 0:
            return
        feature_acts, rebuilt = feature_acts.float(), rebuilt.float()
        # Around the bias, which is about the mean: sums of large numbers that cancel would leave nothing of small ones.
        targets = {"error": acts - rebuilt, "reconstruction": rebuilt - self.crosscoder.b_dec}
        models = self.crosscoder.partition.models.values()
        sums: dict[str, Tensor] = {
            "n": torch.tensor(float(len(acts)), dtype=torch.double, device=acts.device),
            "f": feature_acts.sum(dim=0, dtype=torch.double),
            "squares": feature_acts.double().pow(2).sum(dim=0),
        }
        for name, y in targets.items():
            along = [y[:, m] @ self.directions[:, m].T for m in models]
            sums[name] = torch.stack(
                [(feature_acts * x).sum(dim=0, dtype=torch.double) for x in along]
            )
            sums[f"{name} sum"] = torch.stack([x.sum(dim=0, dtype=torch.double) for x in along])
        self._nu.update(sums)

    def estimates(self) -> dict[str, Estimate]:
        """`nu_error` and `nu_reconstruction` of each latent; NaN where it did not fire, or always alike, or has no direction in the target.

        Raises:
            ValueError: No batch was counted.
        """
        return self._nu.estimates()
