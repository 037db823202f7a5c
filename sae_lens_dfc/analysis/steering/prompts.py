"""Tokenizes a prompt as a model reads it, and finds the tokens that cover a span of its text."""

import re
from itertools import accumulate
from typing import Any

from sae_lens_dfc.data.alignment.chat import Content, locate, n_leading_bos, render_chat
from sae_lens_dfc.data.alignment.tokens import Tokens, tokenize
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.models.hooked_model import HookedModel


def prompt_ids(model: HookedModel, prompt: str, raw: bool = False) -> list[int]:
    """The prompt's token ids, formatted as a user message if the model has a chat template.

    Args:
        model: The model.
        prompt: The prompt, without lone surrogates (see `texts.clean`).
        raw: Do not apply the chat template.

    Raises:
        ValueError: The chat template rejects the prompt, or the prompt contains a token that the
            model has no embedding for.
    """
    ids = tokenize(model.tokenizer, _rendered(model, prompt, raw)).ids
    model.check_ids(ids)
    # The template may already have added the beginning-of-sequence token.
    return [*model.bos_ids, *ids[n_leading_bos(model.tokenizer, ids) :]]


def span_mask(model: HookedModel, prompt: str, span: str, raw: bool = False) -> list[bool]:
    """Which tokens of `prompt_ids` overlap a span of the prompt, at each of its occurrences.

    A partial overlap counts, such as a word token that includes the preceding space. Text added by
    the chat template does not count.

    Args:
        model: The model.
        prompt: The prompt, without lone surrogates.
        span: The span, as an exact substring.
        raw: Whether the prompt is read without the chat template.

    Raises:
        ValueError: The span is empty or not in the prompt, or the chat template changes the prompt.
    """
    text = _rendered(model, prompt, raw)
    offset, *part = _content(model, prompt, text)
    pattern = re.compile(re.escape(clean(span)))
    found = [m.span() for m in pattern.finditer(prompt, *part)] if span else []
    if not found:
        raise ValueError(
            f"The span {span!r} is not in the prompt {prompt!r}, as model {model.name!r} reads it. Give an exact substring."
        )
    tokens = tokenize(model.tokenizer, text)
    holds = [
        any(start < offset + last and end > offset + first for first, last in found)
        for start, end in _characters(tokens)
    ]
    return [False] * len(model.bos_ids) + holds[n_leading_bos(model.tokenizer, tokens.ids) :]


def _rendered(model: HookedModel, prompt: str, raw: bool) -> str:
    if raw or not model.tokenizer.chat_template:
        return prompt
    return render_chat(model.tokenizer, _chat(prompt), add_generation_prompt=True)


def _chat(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def _content(model: HookedModel, prompt: str, text: str) -> Content:
    """Locate the prompt in the rendered text."""
    if text == prompt:
        return Content(0, 0, len(prompt))
    tokenizer, chat = model.tokenizer, _chat(prompt)
    content = locate(tokenizer, chat, 0, render_chat(tokenizer, chat))
    if content is not None:
        offset, start, end = content
        if text[offset + start : offset + end] == prompt[start:end]:
            return content
    raise ValueError(
        f"The chat template of model {model.name!r} does not hold the prompt as it is, so no span of it can be found. "
        "Leave the template out (raw), or steer the whole prompt."
    )


def _characters(tokens: Tokens) -> list[tuple[int, int]]:
    """Start and end character of each token, end excluded."""
    reach = [0, *accumulate((int(end) for end in tokens.ends), max)]
    # After a token that ends inside a character, the next one starts in that same character.
    inside = [False, *(not whole for whole in tokens.whole)]
    return [
        (start - shared, end)
        for start, shared, end in zip(reach[:-1], inside[:-1], reach[1:], strict=True)
    ]
