"""The Dedicated Feature Crosscoder: some latents may use one model only."""

import math
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig, TrainingCrosscoder


@dataclass(kw_only=True)
class DFCTrainingCrosscoderConfig(CrosscoderTrainingConfig):
    """Settings of a DFC (arXiv 2602.11729, section 2.2).

    Raises:
        ValueError: A fraction lies outside [0, 0.5), or is so small that it leaves no latent.

    >>> cfg = DFCTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=110, k=4)
    >>> cfg.n_a_exclusive, cfg.n_b_exclusive, cfg.partition.n_shared
    (5, 5, 100)
    """

    a_exclusive_fraction: float = 0.05
    """Share of the latents that only model A may use; the floor of share x d_sae is their number."""
    b_exclusive_fraction: float = 0.05
    """Share of the latents that only model B may use."""
    decoder_norm: Literal["sum", "l2"] = "l2"
    """Norm by which a latent's activation is multiplied to compete. l2: of its joined decoder row, fair to latents of
    one model. sum: of its two decoder norms, as in the public DFC code, which starves them (benchmarks/README.md)."""
    selection: Literal["pooled", "partition"] = "pooled"
    """How latents compete for k. pooled: all together, so that exclusive latents are used as far as they are worth it.
    partition: each partition by itself, k shared out in proportion to its latents, used whether worth it or not."""

    @override
    def __post_init__(self) -> None:
        for name in ("a_exclusive_fraction", "b_exclusive_fraction"):
            fraction = getattr(self, name)
            if not 0 <= fraction < 0.5:
                raise ValueError(f"{name} must be in [0, 0.5), got {fraction}.")
            if fraction > 0 and math.floor(fraction * self.d_sae) == 0:
                raise ValueError(
                    f"{name}={fraction} of d_sae={self.d_sae} is less than one latent. "
                    "Raise either, or set the fraction to 0."
                )
        super().__post_init__()

    @property
    @override
    def n_a_exclusive(self) -> int:
        return math.floor(self.a_exclusive_fraction * self.d_sae)

    @property
    @override
    def n_b_exclusive(self) -> int:
        return math.floor(self.b_exclusive_fraction * self.d_sae)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "dfc"


class DFCTrainingCrosscoder(TrainingCrosscoder[DFCTrainingCrosscoderConfig]):
    """A BatchTopK crosscoder with four blocks of exact zeros: no exclusive latent reads or writes the other model."""

    @override
    def budgets(self) -> list[tuple[slice, float]]:
        cfg = self.cfg
        if cfg.selection == "pooled":
            return [(slice(0, cfg.d_sae), cfg.k)]
        partition = self.partition
        return [
            (latents, cfg.k * partition.sizes[name] / cfg.d_sae)
            for name, latents in partition.slices.items()
            if partition.sizes[name] > 0
        ]
