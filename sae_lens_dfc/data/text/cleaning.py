"""Replaces lone surrogates in text and splits long text."""

import re
from collections.abc import Iterator

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace lone surrogates, which tokenizers reject, without changing the number of characters.

    >>> clean("a\\ud800b")
    'a\\ufffdb'
    """
    return _LONE_SURROGATE.sub("\ufffd", text)


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Split a long document into pieces of at most `max_chars`, each cut at its last newline, else
    at its last space.

    A SentencePiece tokenizer without a pre-tokenizer takes time quadratic in the length of a
    string.

    >>> list(split_text("one two\\nthree four", max_chars=10))
    ['one two', '\\nthree', ' four']
    """
    start = 0
    while start < len(text):
        end = min(len(text), start + max_chars)
        if end < len(text):
            cut = max(text.rfind("\n", start + 1, end), start)
            cut = cut if cut > start else max(text.rfind(" ", start + 1, end), start)
            end = cut if cut > start else end
        yield text[start:end]
        start = end
