"""Decodes tokens one at a time."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def spelled(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Sequence[int]]
) -> list[list[str]]:
    """The text of each token; if several tokens hold the bytes of one character, the last one gets
    it.

    Each token is decoded together with all tokens before it, because some tokenizers drop the space
    before the first token that they decode.
    """
    texts: list[list[str]] = []
    ids: list[int] = []
    shown = text = ""
    for segment in segments:
        texts.append([])
        for i in segment:
            ids.append(i)
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            is_whole = not text.endswith("\ufffd")
            texts[-1].append(text[len(shown) :] if is_whole else "")
            shown = text if is_whole else shown
        if texts[-1] and not texts[-1][-1]:
            # Incomplete bytes at the end of a segment are shown in it.
            texts[-1][-1] = text[len(shown) :]
            shown = text
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text that one token adds, including its space; if that is empty or part of a character,
    the token as spelled in the vocabulary."""
    anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    text = spelled(tokenizer, [anchor, [token]])[1][0]
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))
