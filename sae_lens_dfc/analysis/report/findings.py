"""Defines the data of a screening: the counts of each stage, and the findings on tested latents."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SteeringSample:
    """A model's continuations of one prompt, with and without intervening on a latent."""

    model: Literal["a", "b"]
    change: str
    """Operation on the latent: add, scale, clamp or ablate."""
    strength: float
    """Strength, in units of the latent's maximum activation on text."""
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class EffectView:
    """Effect of steering with a latent with its confidence interval, and the effects of
    controls."""

    name: str
    mean: float
    low: float
    """Lower end of the interval."""
    high: float
    controls: dict[str, float]
    """Each control's 95th percentile, by its name."""


@dataclass(frozen=True)
class Finding:
    """A latent that reached the end of the screening."""

    latent: int
    partition: str
    rank: int
    """Rank; 1 is the first to look at."""
    description: str | None
    """When it fires, in words; none without a judge."""
    detection: float | None
    """Detection score of the description."""
    concerns: list[str]
    """Types of concern it was flagged with."""
    effects: list[EffectView]
    samples: list[SteeringSample]
    verdict: str
    """Verdict in a word or two."""
    reasons: list[str]
    """Reasons for the verdict, one sentence each."""


@dataclass(frozen=True)
class StageCount:
    """Number of latents entering and leaving a stage.

    >>> StageCount("alive", intake=2048, output=1990, dropped={"never fired": 58}).stage
    'alive'
    """

    stage: str
    intake: int
    output: int
    dropped: dict[str, int]
    """Number of dropped latents by reason."""


@dataclass(frozen=True)
class Screening:
    """The results of a screening."""

    stages: list[StageCount]
    findings: list[Finding]
    shared: list[Finding] = field(default_factory=list)
    """Shared latents that were ablated in both models."""
    divergence: dict[str, float] = field(default_factory=dict)
    """Divergence explained by the first latents, by metric; empty if it was not measured."""
