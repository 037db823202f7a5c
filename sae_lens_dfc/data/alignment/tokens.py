"""Tokenizes a text and finds the character at which each token ends."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment.spans import true_spans

UNKNOWN = "\ufffd"
"""Spelling given to unknown tokens, whose characters cannot be recovered from the vocabulary."""


class Tokens(NamedTuple):
    """A text's tokens, without added special tokens."""

    ids: Sequence[int]
    """Token ids."""
    ends: Sequence[int] | Int[np.ndarray, " n"]
    """End of each token, in characters of the text (exclusive)."""
    whole: Sequence[bool] | Bool[np.ndarray, " n"]
    """Whether each token ends at the end of a character rather than inside it."""
    strings: Sequence[str]
    """The tokens as spelled in the vocabulary; if any token ends inside a character, unknown tokens
    are spelled `UNKNOWN`."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokenize `text` and find the character at which each token ends.

    For a token that ends inside a character (some of its bytes, or part of its normalized form),
    tokenizer offsets give that character's end, and the next token then starts before this end. A
    letter and the accents that a normalizer composes with it count as one character.

    Args:
        tokenizer: A fast tokenizer, which has offsets.
        text: The text, without lone surrogates (see `cleaning.clean`).

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
    """Spelling of the unknown token; None if there is none."""
    model = tokenizer.model
    if not isinstance(model, Unigram):
        return getattr(model, "unk_token", None)
    # Only its repr has the unknown id; the repr of other models is slow.
    found = re.match(r"Unigram\(unk_id=(\d+)", repr(model))
    return tokenizer.id_to_token(int(found[1])) if found else None
