"""Whether steering with a latent does the same to both models: texts that a judge compares."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.generate import Sampling, answer
from sae_lens_dfc.judge import Judge, NoNumber, similarity
from sae_lens_dfc.metrics.directions import (
    PROMPTS,
    Directions,
    by_group,
    check_directions,
    random_directions,
)
from sae_lens_dfc.metrics.spread import mean_and_error
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.prompts import prompt_ids
from sae_lens_dfc.texts import clean

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class JudgedOptions(Sampling):
    """How texts of two steered models are drawn for a judge; the values of arXiv 2602.11729, section 3.2.2.

    Raises:
        ValueError: There is no prompt, a strength is negative, or a number is out of its range.
    """

    prompts: tuple[str, ...] = PROMPTS
    """Questions that the steered models answer."""
    strengths: tuple[float, ...] = tuple(float(s) for s in range(11))
    """Multiples of a latent's largest activation that are added at every token; at 0 all latents have the same texts."""
    max_new_tokens: int = 200
    """Tokens after which an answer is cut."""
    temperature: float = 0.7
    """How freely tokens are drawn; 0 takes the likeliest."""
    top_p: float = 0.9
    """Tokens are drawn from the likeliest that have this much probability together; 1 takes all."""
    n_random: int = 4
    """Number of pairs of random directions, the control; each costs as many judgements as a latent."""
    seed: int = 42
    """Seed of the random directions and of the draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts or not self.strengths:
            raise ValueError("Behaviour needs at least one prompt and one strength. Give some.")
        if not all(0 <= s < inf for s in self.strengths):
            raise ValueError(f"Each of strengths must be 0 or above, got {self.strengths}.")
        if self.n_random < 0:
            raise ValueError(f"n_random must be 0 or above, got {self.n_random}.")


class Judged(NamedTuple):
    """Two texts and what the judge said of them."""

    prompt: str
    """The question."""
    strength: float
    """Strength of the steering in both models."""
    text_a: str
    """Steered A's answer."""
    text_b: str
    """Steered B's."""
    similarity: int | None
    """From 1 (nothing in common) to 5 (the same); none where the judge gave no number."""


class JudgedResult(NamedTuple):
    """The scores of all latents, and the texts behind each."""

    metrics: dict[str, float]
    """Flat, see `judged_behaviour`."""
    scores: dict[int, float]
    """Of each latent: 6 minus the mean similarity, from 1 (shared) to 5 (exclusive)."""
    latents: dict[int, list[Judged]]
    """What each latent's score is from."""
    random: list[list[Judged]]
    """The same of each pair of random directions."""


def n_judgements(n_latents: int, options: JudgedOptions) -> int:
    """How often `judged_behaviour` will ask the judge.

    >>> n_judgements(10, JudgedOptions())  # 3 prompts, 10 strengths, 10 latents and 4 controls; and strength 0 once
    423
    """
    n_steered = sum(strength > 0 for strength in options.strengths)
    n_unsteered = len(options.strengths) - n_steered
    n_directions = n_latents + options.n_random
    return len(options.prompts) * (n_steered * n_directions + n_unsteered)


def judged_behaviour(
    pair: ModelPair,
    directions: Mapping[int, Directions],
    groups: Mapping[int, str],
    judge: Judge,
    options: JudgedOptions | None = None,
) -> JudgedResult:
    """The exclusivity score of arXiv 2602.11729 (section 3.2.2, appendix B.5): steer both models, compare their texts.

    A latent's score is `6 - similarity`, a mean over prompts and strengths: 1 when the models say the same, 5 when they
    have nothing in common. Two unlike models score high unsteered too, so it is to be read beside that of the random
    directions. Both models draw with the same random numbers.

    Keys of the metrics: `behaviour/judged/GROUP` for each group of latents and for `random`, with `/se` the standard
    error over its latents, as far as they have a score.

    Args:
        pair: The two models, with all their layers.
        directions: What each latent adds at strength 1.
        groups: Each latent's group, e.g. its partition's name.
        judge: Who compares; asked `n_judgements` times.
        options: Prompts, strengths, draws and the control.

    Raises:
        ValueError: As `behaviour`; or a prompt and its answer are longer than a model reads, or the judge cannot be asked.
    """
    options = options or JudgedOptions()
    check_directions(pair, directions, groups)
    check_room(pair, options)
    control = random_directions(list(directions.values()), options.n_random, options.seed)
    n = n_judgements(len(directions), options)
    with tqdm(total=n, desc="Asking the judge", unit=" texts", leave=False) as progress:

        def counted(prompt: str, /) -> str:
            progress.update()
            return judge(prompt)

        def compared(text_a: str, text_b: str) -> int | None:
            try:
                return similarity(counted, text_a, text_b)
            except NoNumber as error:
                # One answer in hundreds is not worth all the others.
                logger.warning("%s", error)
                return None

        def asked(given: Directions, strengths: Sequence[float]) -> list[Judged]:
            return [
                Judged(*texts, similarity=compared(*texts[2:]))
                for texts in _steered_texts(pair, given, strengths, options)
            ]

        # At strength 0 no direction is added: the same texts for all.
        unsteered = asked(next(iter(directions.values())), [s for s in options.strengths if s == 0])
        steered = [s for s in options.strengths if s > 0]
        found = [unsteered + asked(d, steered) for d in (*directions.values(), *control)]
    latents = dict(zip(directions, found, strict=False))
    random = found[len(directions) :]
    scores = {latent: score(judged) for latent, judged in latents.items()}
    metrics: dict[str, float] = {}
    for group, values in by_group(scores, groups, [score(judged) for judged in random]).items():
        # A latent of which the judge gave no number at all has no score.
        if with_number := [value for value in values if not isnan(value)]:
            metrics |= mean_and_error(f"behaviour/judged/{group}", with_number)
    every = [one for judged in found for one in judged]
    without = sum(one.similarity is None for one in every)
    metrics["behaviour/judged/without_number"] = without / max(1, len(every))
    return JudgedResult(metrics, scores, latents, random)


def score(judged: Sequence[Judged]) -> float:
    """6 minus the mean similarity; NaN where the judge gave no number at all.

    >>> score([Judged("?", 1, "x", "y", similarity=1), Judged("?", 2, "x", "y", similarity=4)])
    3.5
    """
    known = [one.similarity for one in judged if one.similarity is not None]
    return 6 - fmean(known) if known else nan


def check_room(pair: ModelPair, options: JudgedOptions) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        ValueError: A prompt and `max_new_tokens` are more than one of the models reads.
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
