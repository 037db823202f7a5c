"""Latent scaling: measures whether the other model's activations contain a latent's direction after
all."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import moved_decoders
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.jackknife import Estimate, Jackknife, Sums, variation


@torch.no_grad()
def owned_by_a(crosscoder: Crosscoder) -> Bool[Tensor, " d_sae"]:
    """Whether a latent's *source*, the model in which its decoder is stronger, is A; the other
    model is its *target*."""
    norms = crosscoder.decoder_norms()
    return norms[0] >= norms[1]


@torch.no_grad()
def directions(
    crosscoder: Crosscoder, affine_maps: AffineMaps | None
) -> Float[Tensor, "d_sae d_in"]:
    """Each latent's decoder in its source and the same direction in its target, concatenated on the
    last axis, in raw units.

    Args:
        crosscoder: The saved crosscoder.
        affine_maps: Maps directions to the target, keeping their length; see `moved_decoders`.

    Raises:
        ValueError: There is no map and the models' widths differ.
    """
    is_a = owned_by_a(crosscoder)[:, None]
    in_a, in_b = (crosscoder.W_dec.float()[:, m] for m in crosscoder.partition.models.values())
    a_in_b, b_in_a = moved_decoders(crosscoder, affine_maps)
    return torch.cat([torch.where(is_a, in_a, b_in_a), torch.where(is_a, a_in_b, in_b)], dim=-1)


@dataclass
class LatentScaling:
    """Measures how much of each latent's direction is in the target model's error and
    reconstruction (arXiv 2504.02922).

    With `f` a latent's activation and `d_m` its direction in model m, the least-squares solution of
    `f beta d_m = y_m`, with an intercept, is

        beta = cov(f, <d_m, y_m>) / (|d_m|^2 var(f))

    `nu_error` is the target's beta over the source's if `y` is the reconstruction error with the
    latent's own contribution added back. Near 1, the target has the direction and the crosscoder
    left it out there (complete shrinkage). `nu_reconstruction` is the same ratio if `y` is the
    reconstruction. Near 1, the direction is reconstructed in the target, by other latents (latent
    decoupling) or, if it has a decoder there, by the latent itself. Both are near 0 for a latent
    that is exclusive to its source. An inexact map misplaces directions and lowers both for every
    latent.

    The paper uses `sum f <d, y> / (|d|^2 sum f^2)`, a regression without an intercept. Activations
    are never negative, so it attributes any constant part of `y` along `d` to the latent, and a
    model's mean may dominate its activations. For sparse latents and centered activations the two
    are nearly equal.

    >>> from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
    >>> crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, d_a=1, d_b=1))
    >>> crosscoder.W_enc.data, crosscoder.W_dec.data = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    >>> scaling = LatentScaling(crosscoder, torch.ones(1, 2))
    >>> acts = torch.tensor([[1.0, 9.5], [2.0, 10.0]])  # B has half of it, and the crosscoder does not model that
    >>> scaling.update(acts, crosscoder.encode(acts), crosscoder(acts))
    >>> {name: nu.value.item() for name, nu in scaling.estimates().items()}
    {'nu_error': 0.5, 'nu_reconstruction': 0.0}

    Args:
        crosscoder: The saved crosscoder.
        directions: Each latent's direction in both models, concatenated on the last axis, in raw
            units; see `directions`.
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
        """Add a batch of raw activations, their latent activations and reconstruction."""
        if len(acts) == 0:
            return
        feature_acts, rebuilt = feature_acts.float(), rebuilt.float()
        # Centered by the bias, which is close to the mean: otherwise large sums would cancel and
        # lose small values.
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
        """`nu_error` and `nu_reconstruction` of each latent; NaN if its activation does not vary or
        it has no direction in the target.

        Raises:
            ValueError: No batch was added.
        """
        return self._nu.estimates()
