"""What a screening says: how many latents each stage let through, and what is known of those that came to its end."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SteeringSample:
    """One prompt that a model went on from, as it is and with a latent changed."""

    model: Literal["a", "b"]
    change: str
    """What is done with the latent: add, scale, clamp or ablate."""
    strength: float
    """In units of the latent's largest activation on text."""
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class EffectView:
    """What steering with a latent does, with its interval, beside what steering with controls does."""

    name: str
    mean: float
    low: float
    """Lower end of the interval."""
    high: float
    controls: dict[str, float]
    """Each control's 95th percentile, by its name."""


@dataclass(frozen=True)
class Finding:
    """A latent that came to the end of the screening."""

    latent: int
    partition: str
    rank: int
    """1 is the first to look at."""
    description: str | None
    """When it fires, in words; none where no judge was asked."""
    detection: float | None
    """Share of contexts of which the description tells rightly whether the latent fires."""
    concerns: list[str]
    """Concern types that it was flagged with."""
    effects: list[EffectView]
    samples: list[SteeringSample]
    verdict: str
    """In a word or two."""
    reasons: list[str]
    """What the verdict rests on, a sentence each."""


@dataclass(frozen=True)
class StageCount:
    """How many latents came into a stage and out of it.

    >>> StageCount("alive", intake=2048, output=1990, dropped={"never fired": 58}).stage
    'alive'
    """

    stage: str
    intake: int
    output: int
    dropped: dict[str, int]
    """How many were dropped, by why."""


@dataclass(frozen=True)
class Screening:
    """A screening from beginning to end."""

    stages: list[StageCount]
    findings: list[Finding]
