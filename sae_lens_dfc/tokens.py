"""One text in one tokenizer: its tokens, and the character at which each of them ends."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.gguf_file import check_gguf
from sae_lens_dfc.spans import true_spans
from sae_lens_dfc.texts import first_line

UNKNOWN = "\ufffd"
"""Stands for a token whose spelling does not say what it has read."""


class Tokens(NamedTuple):
    """A text's tokens, without added special ones."""

    ids: Sequence[int]
    """Token ids."""
    ends: Sequence[int] | Int[np.ndarray, " n"]
    """How many characters of the text the token reaches."""
    whole: Sequence[bool] | Bool[np.ndarray, " n"]
    """Whether the token ends where its last character does, rather than inside it."""
    strings: Sequence[str]
    """The tokens as the tokenizer's vocabulary spells them, and unknown ones as `UNKNOWN` where any ends inside a character."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of `text` with the character each ends at.

    Tokenizers give a token that ends inside a character (bytes of it, or a piece of what a
    normalizer made of it) that character's end all the same; the next token then starts before it.
    A letter and the accents that a normalizer joins with it count as one character.

    Args:
        tokenizer: Any tokenizer that maps back to characters (Hugging Face calls these fast).
        text: The text, without lone surrogates (see `texts.clean`).

    Raises:
        ValueError: The tokenizer cannot map its tokens back to the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Tokenizer {tokenizer.name_or_path!r} cannot map tokens back to characters (it is not a fast "
            "tokenizer). Load the model's fast tokenizer, or convert it with the tokenizers library."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    strings: list[str] = tokenizer.convert_ids_to_tokens(ids)  # type: ignore[assignment]
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    starts, ends = true_spans(backend, text, spans, strings).T
    whole = np.append(starts[1:] >= ends[:-1], True)[: len(ids)]
    if not whole.all():
        unknown = _unknown(backend)
        strings = [UNKNOWN if string == unknown else string for string in strings]
    return Tokens(ids, ends, whole, strings)


def _unknown(tokenizer: Tokenizer) -> str | None:
    """How the token that stands for all that is not in the vocabulary is spelled."""
    model = tokenizer.model
    if not isinstance(model, Unigram):
        return getattr(model, "unk_token", None)
    # It says which one it is nowhere but in its description, which for other models takes long to make.
    found = re.match(r"Unigram\(unk_id=(\d+)", repr(model))
    return tokenizer.id_to_token(int(found[1])) if found else None


def spelled(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Sequence[int]]
) -> list[list[str]]:
    """Each token's text; of tokens that hold bytes of one character, the last gets the character.

    Decoded from the start each time, since some tokenizers drop the space before what they decode first.
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
            # The segment ends here whatever its last bytes decode to.
            texts[-1][-1] = text[len(shown) :]
            shown = text
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What one token adds to a text, its space too; as the vocabulary spells it where that is part of a character or nothing."""
    anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    text = spelled(tokenizer, [anchor, [token]])[1][0]
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a hub name, a folder or a GGUF file; code that comes with it is not run.

    Raises:
        ValueError: There is none at that place.
    """
    from pathlib import Path

    from transformers import AutoTokenizer

    path = Path(name_or_path)
    try:
        if path.suffix == ".gguf" and path.is_file():
            check_gguf(path)
            # Of a tokenizer's own code transformers would ask on the terminal whether to run it: nobody may be there.
            return AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )
        return AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(
            f"Could not load a tokenizer from {name_or_path!r}: {type(error).__name__}: "
            f"{first_line(error)} Give a hub name, a folder with tokenizer.json, or a .gguf file."
        ) from error
