"""The crosscoder with designated shared features (DSF): some latents have one decoder for both
models."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.architectures.topk import (
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.base import DECODER_TOLERANCE
from sae_lens_dfc.stats.affine_maps import ridge_weights

RIDGE = 1e-3


@dataclass(kw_only=True)
class DSFTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a crosscoder with designated shared features (DSF).

    Mishra-Sharma et al. 2025, "Insights on crosscoder model diffing", in the BatchTopK form of
    arXiv 2602.11729, appendix B.3: a larger share of `k` replaces a lower L1 penalty. That this
    share is a separate budget, taken from the other latents', is our reading.

    Raises:
        ValueError: No latent or every latent is tied, their share of `k` exceeds 1, or the models
            differ in width with `tie="identity"`.

    >>> cfg = DSFTrainingCrosscoderConfig(d_a=16, d_b=16, d_sae=64, k=10)
    >>> cfg.n_tied, cfg.tied_share_of_k
    (6, 0.1875)
    """

    tied_fraction: float = 0.1
    """Fraction of the latents that have one decoder for both models; there are floor(fraction x
    d_sae)."""
    k_tied_multiplier: float = 2.0
    """The tied latents' share of k, as a multiple of their proportional share."""
    tie: Literal["identity", "linear_map"] = "identity"
    """How B's decoder is tied to A's. identity: both are equal after each model's scaling, for two
    models that share a basis, such as a base model and its fine-tune. linear_map: B's is A's times
    the least-squares map from A's to B's activations, for any two models."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("tied_fraction",), "at least 0 and at most 1")
        if not 0 < self.n_tied < self.d_sae:
            raise ValueError(
                f"tied_fraction={self.tied_fraction} of d_sae={self.d_sae} ties {self.n_tied} latents; "
                "some must be tied and some not."
            )
        if not 0 < self.tied_share_of_k < 1:
            raise ValueError(
                f"k_tied_multiplier={self.k_tied_multiplier} gives the tied latents {self.tied_share_of_k:.0%} of k; "
                "lower it, or lower tied_fraction."
            )
        if self.tie == "identity" and self.d_a != self.d_b:
            raise ValueError(
                f"tie='identity' is one decoder for both models, which needs one width; got d_a={self.d_a} and "
                f"d_b={self.d_b}. Set tie='linear_map'."
            )

    @property
    def n_tied(self) -> int:
        """Number of latents with one decoder; they come first."""
        return math.floor(self.tied_fraction * self.d_sae)

    @property
    def tied_share_of_k(self) -> float:
        """The tied latents' share of `k`."""
        return self.k_tied_multiplier * self.n_tied / self.d_sae

    @override
    @classmethod
    def architecture(cls) -> str:
        return "dsf_crosscoder"


class DSFTrainingCrosscoder(TopKTrainingCrosscoder[DSFTrainingCrosscoderConfig]):
    """A BatchTopK crosscoder whose first latents are tied and compete among themselves.

    The B side of a tied decoder row is never read: the tie is applied wherever the decoder is used,
    so no write to the weights can break it. The saved form contains both sides.
    """

    tie_map: Float[Tensor, "d_a d_b"]

    def __init__(self, cfg: DSFTrainingCrosscoderConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        tie_map = torch.eye(cfg.d_a, cfg.d_b, dtype=self.dtype, device=self.device)
        self.register_buffer("tie_map", tie_map)

    @override
    def topk_groups(self) -> list[tuple[slice, float]]:
        n, share = self.cfg.n_tied, self.cfg.tied_share_of_k
        return [(slice(0, n), share), (slice(n, self.cfg.d_sae), 1 - share)]

    @override
    def decoder(self) -> Float[Tensor, "d_sae d_in"]:
        n, d_a = self.cfg.n_tied, self.cfg.d_a
        tied_a = self.W_dec[:n, :d_a]
        tied_b = tied_a if self.cfg.tie == "identity" else tied_a @ self.tie_map
        return torch.cat([torch.cat([tied_a, tied_b], dim=1), self.W_dec[n:]])

    @override
    @torch.no_grad()
    def fit_normalization(self, acts: Float[Tensor, "n d_in"]) -> None:
        """Set each model's mean and scale, and the map that ties the decoders, from raw
        activations.

        Raises:
            ValueError: There are too few pairs for the map.
        """
        super().fit_normalization(acts)
        if self.cfg.tie == "linear_map":
            x = self._normalize(acts)
            models = self.partition.models
            self.tie_map.copy_(linear_map(x[:, models["a"]], x[:, models["b"]]))
        # The encoder is initialized to the decoder's transpose, and the tied rows' B side is known
        # only now.
        n = self.cfg.n_tied
        self.W_enc.data[:, :n] = self.decoder()[:n].T


@torch.no_grad()
def linear_map(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> Float[Tensor, "d_x d_y"]:
    """Ridge regression from `x` to `y` over all ranks, both centered; the penalty is `RIDGE` times
    `x`'s mean variance.

    Raises:
        ValueError: There are fewer than twice as many pairs as dimensions, or `x` does not vary.
    """
    n, d_x, dtype = distributed.n_rows(x), x.shape[1], x.dtype
    if n < 2 * d_x:
        raise ValueError(
            f"A linear map from {d_x} dimensions needs at least {2 * d_x} pairs, got {n}. "
            "Raise n_batches_for_norm_estimate or the batch."
        )
    mean = distributed.mean_of_rows(x.double())
    x, y = x.double() - mean, y.double() - distributed.mean_of_rows(y.double())
    covariance, products = distributed.all_reduce_sum(x.T @ x), distributed.all_reduce_sum(x.T @ y)
    if not covariance.diagonal().sum() > n * (DECODER_TOLERANCE * mean.norm()).pow(2):
        raise ValueError(
            f"No linear map can be fitted: model A's {d_x} dimensions do not vary over {n} pairs. Check model A's hook "
            "and the text, or give more pairs (n_batches_for_norm_estimate)."
        )
    return ridge_weights(covariance, products, RIDGE).to(dtype)
