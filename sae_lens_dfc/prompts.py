"""What a model reads of a prompt, and which of its tokens hold a piece of the prompt's text."""

import re
from itertools import accumulate
from typing import Any

from sae_lens_dfc.chat import Content, locate, n_leading_bos, render_chat
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.texts import clean
from sae_lens_dfc.tokens import Tokens, tokenize


def prompt_ids(model: HookedModel, prompt: str, raw: bool = False) -> list[int]:
    """The prompt's tokens as the model is to read them: a user's message where it has a chat template.

    Args:
        model: The model.
        prompt: The prompt, without lone surrogates (see `texts.clean`).
        raw: Leave the chat template out.
    """
    ids = tokenize(model.tokenizer, _rendered(model, prompt, raw)).ids
    # A template may have put the token there that the model gets anyway.
    return [*model.bos_ids, *ids[n_leading_bos(model.tokenizer, ids) :]]


def span_mask(model: HookedModel, prompt: str, span: str, raw: bool = False) -> list[bool]:
    """Which tokens of `prompt_ids` hold a character of a piece of the prompt, wherever it stands there.

    A token that only begins or ends in the piece counts, such as that of a word with the space before it. What the
    chat template says of its own does not.

    Args:
        model: The model.
        prompt: The prompt, without lone surrogates.
        span: The piece, letter for letter.
        raw: Whether the model reads the prompt without its chat template.

    Raises:
        ValueError: The piece is empty or not in the prompt, or the chat template changes the prompt.
    """
    text = _rendered(model, prompt, raw)
    offset, *part = _content(model, prompt, text)
    pattern = re.compile(re.escape(clean(span)))
    found = [m.span() for m in pattern.finditer(prompt, *part)] if span else []
    if not found:
        raise ValueError(
            f"The span {span!r} is not in the prompt {prompt!r}, as model {model.name!r} reads it. Give a piece of it, "
            "letter for letter."
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
    """Where the prompt stands in the text that holds it."""
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
    """First character of each token, and the one after its last."""
    reach = [0, *accumulate((int(end) for end in tokens.ends), max)]
    # After a token that ends inside a character, the next one starts in that same character.
    inside = [False, *(not whole for whole in tokens.whole)]
    return [
        (start - shared, end)
        for start, shared, end in zip(reach[:-1], inside[:-1], reach[1:], strict=True)
    ]
