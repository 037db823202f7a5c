"""Generates activations of toy model pairs with known shared and exclusive features, using
`sae_lens.synthetic`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    generate_random_low_rank_correlation_matrix,
)
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.partition import Partition, zero_forbidden_


@dataclass(frozen=True)
class ToyPairConfig:
    """Settings of a pair of toy models (arXiv 2602.11729, section 2.3 and algorithm 2, with its
    values as defaults).

    Raises:
        ValueError: A fraction lies outside [0, 1], or a number is not positive; the message names
            the field.

    >>> ToyPairConfig(n_features=512, d_a=128, d_b=96).features.sizes
    {'a_exclusive': 12, 'b_exclusive': 12, 'shared': 488}
    """

    n_features: int = 2048
    """Number of features of both models together."""
    d_a: int = 256
    """Width of model A's activations."""
    d_b: int = 256
    """Width of model B's activations."""
    a_exclusive_fraction: float = 0.025
    """Fraction of the features that only model A has; there are floor(fraction x n_features)."""
    b_exclusive_fraction: float = 0.025
    """Fraction of the features that only model B has."""
    map_bias: float = 0.1
    """Standard deviation of the bias of the map from A's to B's directions; its matrix entries have
    standard deviation 0.5."""
    map_noise: float = 0.0
    """Norm of the noise added to each of B's directions after the map, relative to the direction's
    norm."""
    active_features: float = 5.0
    """Average number of active features per pair."""
    frequency_rank: int = 10
    """Number of common factors in the features' log-odds."""
    frequency_factor_variance: float | None = None
    """Variance of a feature's loading on each factor; none uses 0.5 / sqrt(frequency_rank)."""
    frequency_variance: float = 1.0
    """Variance of the feature-specific part of the log-odds."""
    frequency_decay: float = 0.001
    """Rate of the long tail: a feature's frequency is multiplied by exp(-rate x rank), with ranks
    drawn at random."""
    min_frequency: float = 1e-4
    """Minimum frequency of a feature."""
    firing_correlation: float = 0.0
    """Scale of the correlations between features' firing, of rank `frequency_rank`; 0 makes them
    independent."""
    min_magnitude: float = 0.0
    """Lower bound of an active feature's magnitude, which is drawn uniformly."""
    max_magnitude: float = 1.0
    """Upper bound of an active feature's magnitude."""
    noise: float = 0.01
    """Standard deviation of the noise on each activation."""
    pairing_noise: float = 0.0
    """Fraction of the pairs whose B side belongs to another pair."""
    seed: int = 0
    """Seed of directions, map and frequencies; samples have their own seed."""

    def __post_init__(self) -> None:
        require(
            self, ("n_features", "d_a", "d_b", "frequency_rank", "active_features", "min_frequency")
        )
        scales = ("map_bias", "map_noise", "frequency_variance", "frequency_decay")
        scales += ("firing_correlation", "noise", "frequency_factor_variance")
        require(self, scales, "at least 0")
        shares = ("a_exclusive_fraction", "b_exclusive_fraction", "pairing_noise")
        require(self, shares, "at least 0 and at most 1")
        if not 0 <= self.min_magnitude <= self.max_magnitude:
            raise ValueError(
                "min_magnitude must be at least 0 and at most max_magnitude, "
                f"got {self.min_magnitude} and {self.max_magnitude}."
            )
        if not self.n_features * self.min_frequency < self.active_features < self.n_features:
            raise ValueError(
                f"active_features={self.active_features} must lie between n_features x min_frequency "
                f"({self.n_features * self.min_frequency:g}) and n_features ({self.n_features})."
            )
        _ = self.features  # raises when the sizes do not fit

    @property
    def features(self) -> Partition:
        """Partition of the features, in the order of a crosscoder's latents."""
        n_a, n_b = (
            int(share * self.n_features)
            for share in (self.a_exclusive_fraction, self.b_exclusive_fraction)
        )
        return Partition.of(self.d_a, self.d_b, self.n_features, n_a, n_b)


class ToyPair:
    """A pair of toy models with shared and exclusive features.

    A pair with no active feature gets one, drawn by frequency; the paper's algorithm is unclear
    here. Correlated firing and mismatched pairs are our additions.

    Features are ordered as a crosscoder's latents: `[a_exclusive | b_exclusive | shared]`.

    >>> pair = ToyPair(ToyPairConfig(n_features=64, d_a=8, d_b=12, a_exclusive_fraction=0.25))
    >>> next(pair.batches(batch_size=32)).shape
    torch.Size([32, 20])
    >>> pair.directions[:16, 8:].abs().max().item()  # model B has no direction for A-exclusive features
    0.0
    """

    directions: Float[Tensor, "n_features d_in"]
    """Direction of each feature in A (first `d_a` entries) and in B; 0 if a model lacks the
    feature."""
    frequencies: Float[Tensor, " n_features"]
    """Probability with which each feature fires."""

    def __init__(self, cfg: ToyPairConfig):
        self.cfg = cfg
        self.features = cfg.features
        with temporary_seed(cfg.seed):
            self.directions = _directions(cfg)
            self.frequencies = _frequencies(cfg)
        self._dictionary = FeatureDictionary(
            cfg.n_features, self.features.d_in, bias=False, initializer=None
        )
        self._dictionary.feature_vectors.data = self.directions
        correlation = None
        if cfg.firing_correlation > 0:
            correlation = generate_random_low_rank_correlation_matrix(
                cfg.n_features, cfg.frequency_rank, cfg.firing_correlation, seed=cfg.seed
            )
        self._generator = ActivationGenerator(
            num_features=cfg.n_features,
            firing_probabilities=self.frequencies,
            modify_activations=[self._fire_at_least_one, self._draw_magnitudes],
            correlation_matrix=correlation,
        )

    def batches(self, batch_size: int, seed: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Infinite stream of both models' raw activations, concatenated on the last axis;
        determined by `seed`."""
        return (acts for acts, _ in self.batches_with_features(batch_size, seed))

    def batches_with_features(
        self, batch_size: int, seed: int = 0
    ) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch n_features"]]]:
        """The same, with every feature's magnitude in each pair (in A, if the pair is
        mismatched)."""
        # SAELens' generator uses torch's global RNG: this stream keeps its own state and restores
        # the global one.
        with temporary_seed(seed):
            state = torch.get_rng_state()
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                sample = self._sample(batch_size)
                state = torch.get_rng_state()
            yield sample

    @torch.no_grad()
    def _sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        feature_acts = self._generator.sample(batch_size)
        acts = self._dictionary(feature_acts)
        if self.cfg.noise > 0:
            acts += self.cfg.noise * torch.randn_like(acts)
        if self.cfg.pairing_noise > 0:
            b = self.features.models["b"]
            wrong = torch.rand(batch_size) < self.cfg.pairing_noise
            acts[wrong, b] = acts[:, b].roll(1, dims=0)[wrong]
        return acts, feature_acts

    def _fire_at_least_one(self, feature_acts: Tensor) -> Tensor:
        silent = (feature_acts.sum(dim=-1) == 0).nonzero()[:, 0]
        if len(silent) > 0:
            chosen = torch.multinomial(self.frequencies, len(silent), replacement=True)
            feature_acts[silent, chosen] = 1
        return feature_acts

    def _draw_magnitudes(self, feature_acts: Tensor) -> Tensor:
        rows, columns = feature_acts.nonzero(as_tuple=True)
        magnitudes = torch.empty(len(rows)).uniform_(self.cfg.min_magnitude, self.cfg.max_magnitude)
        feature_acts[rows, columns] = magnitudes
        return feature_acts


def _directions(cfg: ToyPairConfig) -> Float[Tensor, "n_features d_in"]:
    a = torch.nn.functional.normalize(torch.randn(cfg.n_features, cfg.d_a), dim=-1)
    b = a @ (0.5 * torch.randn(cfg.d_a, cfg.d_b)) + cfg.map_bias * torch.randn(cfg.d_b)
    noise = torch.nn.functional.normalize(torch.randn_like(b), dim=-1)
    b = b + cfg.map_noise * b.norm(dim=-1, keepdim=True) * noise
    b = b / b.norm(dim=-1).median()  # median norm 1, like A's directions
    directions = torch.cat([a, b], dim=1)
    zero_forbidden_(directions.T, directions, cfg.features)
    return directions


def _frequencies(cfg: ToyPairConfig) -> Float[Tensor, " n_features"]:
    n, rank = cfg.n_features, cfg.frequency_rank
    variance = cfg.frequency_factor_variance
    variance = 0.5 / rank**0.5 if variance is None else variance
    factors = variance**0.5 * torch.randn(n, rank)
    log_odds = factors @ torch.randn(rank) + cfg.frequency_variance**0.5 * torch.randn(n)
    tail = torch.exp(-cfg.frequency_decay * torch.randperm(n))
    return scaled_to(log_odds.sigmoid() * tail, cfg.active_features, cfg.min_frequency)


def scaled_to(weights: Float[Tensor, " n"], total: float, floor: float) -> Float[Tensor, " n"]:
    """The weights, scaled so that they sum to `total` after clamping between `floor` and 1.

    >>> scaled_to(torch.tensor([1.0, 1.0, 2.0, 0.0]), total=1.0, floor=0.1)
    tensor([0.2250, 0.2250, 0.4500, 0.1000])
    """
    # Bisect on a log scale: a long tail spans many orders of magnitude.
    logs = weights.double().log()
    low, high = -logs.max(), -logs[logs > -math.inf].min()
    low = low + math.log(floor) if floor > 0 else low - 100
    for _ in range(100):
        middle = (low + high) / 2
        if (logs + middle).exp().clamp(floor, 1.0).sum() < total:
            low = middle
        else:
            high = middle
    return (logs + high).exp().clamp(floor, 1.0).to(weights.dtype)
