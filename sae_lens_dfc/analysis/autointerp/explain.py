"""Describes a latent with an LLM judge, scores the description by detection, and flags types of
concern."""

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from random import Random
from typing import Literal

from sae_lens_dfc.analysis.autointerp.concerns import CONCERNS
from sae_lens_dfc.analysis.autointerp.judge import Judge, quoted
from sae_lens_dfc.analysis.autointerp.prompts import (
    DESCRIPTION_CHARS,
    concern_prompt,
    description_prompt,
    detection_prompt,
    parse_concerns,
    parse_description,
    parse_firing,
)
from sae_lens_dfc.analysis.latents.cards import ContextView

logger = logging.getLogger(__name__)

# Segments are marked from this share of the example's activation on; the default of delphi, whose
# prompt the paper uses.
MARKED_SHARE = 0.3
# A description, a detection and the concerns.
QUESTIONS_PER_LATENT = 3
# English prose has about 4; block marks, code and other languages have fewer.
CHARS_PER_TOKEN = 3


def shown_context(view: ContextView, who: Literal["a", "b"] = "a") -> str:
    """A context's text in one model's tokens, with the segments on which the latent fires between «
    and ».

    Segments with at least 0.3 of the example's activation are marked. The text's own « and » become
    ‹ and ›.

    >>> from sae_lens_dfc.analysis.latents.cards import SegmentView
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
    """A context's text in one model's tokens, without marks."""
    return _unmarked("".join(_texts(view, who)))


def describe(
    judge: Judge, contexts: Sequence[ContextView], who: Literal["a", "b"] = "a"
) -> str | None:
    """Describe when a latent fires, in one line of at most 300 characters; none, with a warning, if
    the answer holds no description.

    arXiv 2602.11729, appendix B.4, uses the 10 top-activating contexts.

    Args:
        judge: The judge; it is asked one question.
        contexts: Contexts in which the latent fires.
        who: The model whose tokens are shown.

    Raises:
        ValueError: There is no context, or the judge cannot be asked.
    """
    if not contexts:
        raise ValueError(
            "A description needs contexts, got none. Give at least one in which the latent fires."
        )
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
    """Detection score of a description; none, with a warning, if the judge's answer cannot be
    parsed.

    The judge sees contexts without marks, in random order, and names those in which the latent
    fires. The score is the balanced accuracy, (true positive rate + true negative rate) / 2, which
    is 0.5 for guessing. arXiv 2602.11729, appendix B.4, uses 10 top-activating and 10 random
    contexts, where this equals the accuracy, and calls latents with 0.8 or more interpretable.

    Args:
        judge: The judge; it is asked one question.
        description: When the latent fires.
        firing: Contexts in which it fires, preferably not those used for the description.
        silent: Random contexts in which it does not fire, of similar length, so that length gives
            no hint.
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
    """The types of concern that apply to a latent, in their order; none, with a warning, if the
    judge's answer cannot be parsed.

    Unknown names are ignored with a warning. arXiv 2602.11729, appendix B.4, does this with about
    ten types; a flag is a reason to look, not a finding.

    Args:
        judge: The judge; it is asked one question.
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
            "A judge named unknown concerns, which are ignored: %s",
            quoted(", ".join(sorted(unknown))),
        )
    return [name for name in concerns if name.casefold() in named]


def cost(
    n_latents: int,
    n_chars: int,
    n_contexts: int = 10,
    concerns: Mapping[str, str] = CONCERNS,
) -> str:
    """The maximum cost of explaining, as a sentence to print beforehand.

    Args:
        n_latents: Number of latents.
        n_chars: Approximate characters per context.
        n_contexts: Contexts used to describe a latent; detection uses as many firing and as many
            silent ones.
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
        f"A judge is asked at most {QUESTIONS_PER_LATENT * n_latents:,} questions, about {round(n_tokens, -4):,.0f} tokens in all, "
        "and answers with a line each."
    )


def _texts(view: ContextView, who: Literal["a", "b"]) -> list[str]:
    return ["".join(s.tokens_a if who == "a" else s.tokens_b) for s in view.segments]


def _unmarked(text: str) -> str:
    return text.replace("«", "‹").replace("»", "›")
