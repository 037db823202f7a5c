"""Measures whether steering with a latent has the same effect in both models, by an LLM judge that
compares their texts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.autointerp.judge import Judge, NoNumber, similarity
from sae_lens_dfc.analysis.causal.directions import (
    PROMPTS,
    Directions,
    by_group,
    check_directions,
    random_directions,
)
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.stats.jackknife import mean_and_error

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class JudgedOptions(Sampling):
    """Options for sampling texts from two steered models for a judge; defaults from arXiv
    2602.11729, section 3.2.2.

    Raises:
        ValueError: There is no prompt, a strength is negative, or a number is out of its range.
    """

    prompts: tuple[str, ...] = PROMPTS
    """Questions that the steered models answer."""
    strengths: tuple[float, ...] = tuple(float(s) for s in range(11))
    """Steering strengths, in multiples of a latent's maximum activation, added at every token; at 0
    all latents share the same texts."""
    max_new_tokens: int = 200
    """Maximum length of an answer in tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 0.9
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 keeps
    all."""
    n_random: int = 4
    """Number of pairs of random control directions; each costs as many judgments as a latent."""
    seed: int = 42
    """Seed of the random directions and of sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts or not self.strengths:
            raise ValueError("Behavior needs at least one prompt and one strength. Give some.")
        if not all(0 <= s < inf for s in self.strengths):
            raise ValueError(f"Each of strengths must be 0 or above, got {self.strengths}.")
        require(self, ("n_random",), "at least 0")


class Judged(NamedTuple):
    """Two texts and the judge's similarity rating."""

    prompt: str
    """The question."""
    strength: float
    """Strength of the steering in both models."""
    text_a: str
    """Steered A's answer."""
    text_b: str
    """Steered B's."""
    similarity: int | None
    """From 1 (nothing in common) to 5 (the same); none if the judge gave no number."""


class JudgedResult(NamedTuple):
    """The scores of all latents, and the rated texts."""

    metrics: dict[str, float]
    """Flat, see `judged_behavior`."""
    scores: dict[int, float]
    """For each latent, 6 minus the mean similarity, from 1 (shared) to 5 (exclusive)."""
    latents: dict[int, list[Judged]]
    """The rated texts of each latent."""
    random: list[list[Judged]]
    """The rated texts of each pair of random directions."""


def n_judgments(n_latents: int, options: JudgedOptions) -> int:
    """Number of questions that `judged_behavior` asks the judge.

    >>> n_judgments(10, JudgedOptions())  # 3 prompts, 10 strengths, 10 latents and 4 controls; and strength 0 once
    423
    """
    n_steered = sum(strength > 0 for strength in options.strengths)
    n_unsteered = len(options.strengths) - n_steered
    n_directions = n_latents + options.n_random
    return len(options.prompts) * (n_steered * n_directions + n_unsteered)


def judged_behavior(
    pair: ModelPair,
    directions: Mapping[int, Directions],
    groups: Mapping[int, str],
    judge: Judge,
    options: JudgedOptions | None = None,
) -> JudgedResult:
    """The exclusivity score of arXiv 2602.11729 (section 3.2.2, appendix B.5): steer both models,
    and let a judge compare their texts.

    A latent's score is `6 - similarity`, averaged over prompts and strengths: 1 when the texts are
    the same, 5 when they have nothing in common. Two different models score high unsteered too, so
    compare scores with those of the random directions. Both models sample with the same random
    numbers.

    Metric keys: `behavior/judged/GROUP` for each group of latents and for `random`, with the
    standard error over the latents that have a score in `/se`.

    Args:
        pair: The two models, with all their layers.
        directions: What each latent adds at strength 1.
        groups: Each latent's group, e.g. its partition's name.
        judge: The judge, asked `n_judgments` times.
        options: Prompts, strengths, sampling and number of controls.

    Raises:
        ValueError: As `behavior`; or a prompt and its answer are longer than a model reads, or the
            judge cannot be asked.
    """
    options = options or JudgedOptions()
    check_directions(pair, directions, groups)
    check_context_length(pair, options)
    control = random_directions(list(directions.values()), options.n_random, options.seed)
    n = n_judgments(len(directions), options)
    with tqdm(total=n, desc="Asking the judge", unit=" texts", leave=False) as progress:

        def counted(prompt: str, /) -> str:
            progress.update()
            return judge(prompt)

        def compared(text_a: str, text_b: str) -> int | None:
            try:
                return similarity(counted, text_a, text_b)
            except NoNumber as error:
                # One unparsable answer must not discard hundreds of others.
                logger.warning("%s", error)
                return None

        def asked(given: Directions, strengths: Sequence[float]) -> list[Judged]:
            return [
                Judged(*texts, similarity=compared(*texts[2:]))
                for texts in _steered_texts(pair, given, strengths, options)
            ]

        # At strength 0 no direction is added, so all latents share these texts.
        unsteered = asked(next(iter(directions.values())), [s for s in options.strengths if s == 0])
        steered = [s for s in options.strengths if s > 0]
        found = [unsteered + asked(d, steered) for d in (*directions.values(), *control)]
    latents = dict(zip(directions, found, strict=False))
    random = found[len(directions) :]
    scores = {latent: score(judged) for latent, judged in latents.items()}
    metrics: dict[str, float] = {}
    for group, values in by_group(scores, groups, [score(judged) for judged in random]).items():
        # A latent without any rating has no score.
        if with_number := [value for value in values if not isnan(value)]:
            metrics |= mean_and_error(f"behavior/judged/{group}", with_number)
    every = [one for judged in found for one in judged]
    without = sum(one.similarity is None for one in every)
    metrics["behavior/judged/without_number"] = without / max(1, len(every))
    return JudgedResult(metrics, scores, latents, random)


def score(judged: Sequence[Judged]) -> float:
    """6 minus the mean similarity; NaN without any rating.

    >>> score([Judged("?", 1, "x", "y", similarity=1), Judged("?", 2, "x", "y", similarity=4)])
    3.5
    """
    known = [one.similarity for one in judged if one.similarity is not None]
    return 6 - fmean(known) if known else nan


def check_context_length(pair: ModelPair, options: JudgedOptions) -> None:
    """Check that every prompt leaves room for an answer.

    Raises:
        ValueError: A prompt plus `max_new_tokens` exceeds a model's context length.
    """
    for model in (pair.a, pair.b):
        longest = max(len(prompt_ids(model, clean(prompt))) for prompt in options.prompts)
        if longest + options.max_new_tokens > model.n_ctx:
            raise ValueError(
                f"A prompt of {longest} tokens and an answer of {options.max_new_tokens} are more than model "
                f"{model.name!r} can read ({model.n_ctx}). Lower max_new_tokens."
            )


def _steered_texts(
    pair: ModelPair, given: Directions, strengths: Sequence[float], options: JudgedOptions
) -> Iterator[tuple[str, float, str, str]]:
    """Each prompt and strength, with both models' answers."""
    asked = [(prompt, strength) for prompt in options.prompts for strength in strengths]

    def texts(model: HookedModel, vector: Tensor) -> list[str]:
        ids = [prompt_ids(model, clean(prompt)) for prompt, _ in asked]
        multiples = torch.tensor([strength for _, strength in asked])[:, None]
        vectors = multiples * vector.detach().float().cpu()
        return answer(model, ids, options, options.seed, vectors)

    answers = zip(asked, texts(pair.a, given.a), texts(pair.b, given.b), strict=True)
    for (prompt, strength), text_a, text_b in answers:
        yield prompt, strength, text_a, text_b
