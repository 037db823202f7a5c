"""What a latent is about, as a judge says: a description, how well it tells where the latent fires, what gives concern."""

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from random import Random
from typing import Literal

from sae_lens_dfc.concerns import CONCERNS
from sae_lens_dfc.judge import Judge, quoted
from sae_lens_dfc.latents import ContextView
from sae_lens_dfc.questions import (
    DESCRIPTION_CHARS,
    concern_prompt,
    description_prompt,
    detection_prompt,
    parse_concerns,
    parse_description,
    parse_firing,
)

logger = logging.getLogger(__name__)

# Share of the firing's activation from which on a stretch is marked; the default of delphi, whose prompt the paper takes.
MARKED_SHARE = 0.3
QUESTIONS_PER_LATENT = 3
# English prose has about 4; the marks of blocks, code and other languages have fewer.
CHARS_PER_TOKEN = 3


def shown_context(view: ContextView, who: Literal["a", "b"] = "a") -> str:
    """A context's text in one model's tokens, with what the latent fires on between « and ».

    Marked is each stretch with at least 0.3 of the firing's activation. The text's own « and » become ‹ and ›.

    >>> from sae_lens_dfc.latents import SegmentView
    >>> segments = [SegmentView([text], [text], x) for text, x in [("a", 0.0), (" «cat", 2.0), ("»s", 1.0), (".", 0.5)]]
    >>> shown_context(ContextView(segments, document=0, position_a=2, position_b=2, activation=2.0, quantile=None))
    'a« ‹cat›s».'
    """
    least = MARKED_SHARE * view.activation
    runs = groupby(
        zip(view.segments, _texts(view, who), strict=True),
        key=lambda pair: pair[0].activation > 0 and pair[0].activation >= least,
    )
    texts = ((fires, _unmarked("".join(text for _, text in run))) for fires, run in runs)
    return "".join(f"«{text}»" if fires else text for fires, text in texts)


def plain_context(view: ContextView, who: Literal["a", "b"] = "a") -> str:
    """The same text without the marks."""
    return _unmarked("".join(_texts(view, who)))


def describe(
    judge: Judge, contexts: Sequence[ContextView], who: Literal["a", "b"] = "a"
) -> str | None:
    """When a latent fires, in one line of at most 300 characters; none, with a warning, where the judge says nothing of it.

    arXiv 2602.11729, appendix B.4, asks with the 10 contexts of the largest activations.

    Args:
        judge: Whom to ask, one question.
        contexts: Text on which the latent fires.
        who: The model whose tokens are shown.

    Raises:
        ValueError: There is no context, or the judge cannot be asked.
    """
    if not contexts:
        raise ValueError("A description needs contexts, got none. Give some of where it fires.")
    answer = judge(description_prompt([shown_context(view, who) for view in contexts]))
    description = parse_description(answer)
    if description is None:
        logger.warning("A judge was asked for a description and answered %s", quoted(answer))
    return description


def detect(
    judge: Judge,
    description: str,
    firing: Sequence[ContextView],
    silent: Sequence[ContextView | str],
    seed: int,
    who: Literal["a", "b"] = "a",
) -> float | None:
    """How well a description tells where its latent fires; none, with a warning, where the judge does not answer.

    The judge sees contexts without marks, in random order, and says on which the latent fires. The score is the
    balanced accuracy, (share of the firing that it names + share of the silent that it does not name) / 2: 0.5 for a judge that
    guesses. arXiv 2602.11729, appendix B.4, takes 10 contexts of the largest activations and 10 random ones, where this is the
    plain accuracy, and calls latents from 0.8 on interpretable.

    Args:
        judge: Whom to ask, one question.
        description: When the latent fires.
        firing: Text on which it fires; better not what the description was made from.
        silent: Random text on which it does not, about as long, so that length does not tell.
        seed: Seed of the order.
        who: The model whose tokens are shown.

    Raises:
        ValueError: There is no firing or no silent context, or the judge cannot be asked.
    """
    if not firing or not silent:
        raise ValueError(
            f"Detection needs firing and silent contexts, got {len(firing)} and {len(silent)}. Give at least one of each."
        )
    texts = [
        _unmarked(c) if isinstance(c, str) else plain_context(c, who) for c in (*firing, *silent)
    ]
    order = Random(seed).sample(range(len(texts)), len(texts))
    answer = judge(detection_prompt(description, [texts[i] for i in order]))
    named = parse_firing(answer, len(texts))
    if named is None:
        logger.warning("A judge was asked which texts fire and answered %s", quoted(answer))
        return None
    hits = sum(order[number - 1] < len(firing) for number in named)
    false_alarms = len(named) - hits
    return (hits / len(firing) + 1 - false_alarms / len(silent)) / 2


def flag(
    judge: Judge,
    description: str,
    contexts: Sequence[ContextView],
    concerns: Mapping[str, str] = CONCERNS,
    who: Literal["a", "b"] = "a",
) -> list[str] | None:
    """Which types of concern a latent is about, in their order; none, with a warning, where the judge does not answer.

    A name that is not among them is left out, with a warning. arXiv 2602.11729, appendix B.4, asks so of about ten types; to
    be flagged is a reason to look, not a finding.

    Args:
        judge: Whom to ask, one question.
        description: When the latent fires.
        contexts: Text on which it fires.
        concerns: What each type covers, by name; see `read_concerns`.
        who: The model whose tokens are shown.

    Raises:
        ValueError: There is no type of concern, or the judge cannot be asked.
    """
    if not concerns:
        raise ValueError("There is no type of concern to flag. Give at least one.")
    shown = [shown_context(view, who) for view in contexts]
    answer = judge(concern_prompt(description, shown, concerns))
    said = parse_concerns(answer)
    if said is None:
        logger.warning("A judge was asked which concerns apply and answered %s", quoted(answer))
        return None
    named = {name.casefold() for name in said}
    unknown = named - {name.casefold() for name in concerns}
    if unknown:
        logger.warning(
            "A judge named concerns that are not asked for, left out: %s",
            quoted(", ".join(sorted(unknown))),
        )
    return [name for name in concerns if name.casefold() in named]


def n_questions(n_latents: int) -> int:
    """How often a judge is asked at most: a description, a detection and the concerns of each latent."""
    return QUESTIONS_PER_LATENT * n_latents


def cost(
    n_latents: int,
    n_chars: int,
    n_contexts: int = 10,
    concerns: Mapping[str, str] = CONCERNS,
) -> str:
    """What explaining costs at most, in a sentence to print before it starts.

    Args:
        n_latents: Number of latents.
        n_chars: Characters of a context, about.
        n_contexts: Contexts that describe a latent; detection takes as many firing and as many silent.
        concerns: The types of concern.

    >>> cost(100, n_chars=120)
    'A judge is asked at most 300 questions, about 410,000 tokens in all, and answers with a line each.'
    """
    texts, description = ["x" * n_chars] * n_contexts, "x" * DESCRIPTION_CHARS
    prompts = (
        description_prompt(texts),
        detection_prompt(description, texts + texts),
        concern_prompt(description, texts, concerns),
    )
    n_tokens = n_latents * sum(map(len, prompts)) / CHARS_PER_TOKEN
    return (
        f"A judge is asked at most {n_questions(n_latents):,} questions, about {round(n_tokens, -4):,.0f} tokens in all, "
        "and answers with a line each."
    )


def _texts(view: ContextView, who: Literal["a", "b"]) -> list[str]:
    return ["".join(s.tokens_a if who == "a" else s.tokens_b) for s in view.segments]


def _unmarked(text: str) -> str:
    return text.replace("«", "‹").replace("»", "›")
