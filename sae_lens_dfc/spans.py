"""Which characters each token holds, where a tokenizer's own map back to the text says less than it has read."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_LETTERS = sorted(ByteLevel.alphabet())
# Printable Latin-1 stands for itself, the other bytes in order for letters from U+0100 on.
_BYTES = sorted(range(256), key=lambda byte: (chr(byte) not in _LETTERS, byte))
_LETTER_OF_BYTE = dict(zip(_BYTES, _LETTERS, strict=True))
LETTER_OF_BYTE_TOKEN = {f"<0x{byte:02X}>": letter for byte, letter in _LETTER_OF_BYTE.items()}
"""How byte-level tokenizers spell the bytes that others fall back to."""

SPACE = "Ġ"


def true_spans(
    tokenizer: Tokenizer, text: str, spans: Int[np.ndarray, "tokens 2"], strings: Sequence[str]
) -> Int[np.ndarray, "tokens 2"]:
    """First character of each token and the one after its last, with all that the token has read.

    Four maps are wrong, each by a few characters: after a byte that the vocabulary does not have, and that
    is dropped, the next ones get the spans of those before; bytes of several unknown characters in a row
    all get the span of the whole row (unigram); spaces at a token's end are left out of it (`trim_offsets`
    of byte-level tokenizers), and so are the accents that a normalizer has joined with their letter.

    Args:
        tokenizer: Of the tokenizers library.
        text: What was tokenised.
        spans: The tokenizer's own.
        strings: The tokens as its vocabulary spells them.

    >>> from tokenizers import models, normalizers
    >>> tokenizer = Tokenizer(models.BPE())
    >>> tokenizer.normalizer = normalizers.NFC()
    >>> true_spans(tokenizer, "e\\u0301x", np.array([[0, 1], [2, 3]]), ["é", "x"]).tolist()
    [[0, 2], [2, 3]]
    """
    starts, ends = spans.T.copy()
    _count_dropped(tokenizer, text, starts, ends, strings)
    _untrim(text, starts, ends, strings)
    _part_bytes(text, starts, ends, strings)
    joined = list(_joined(tokenizer.normalizer, text))
    if joined:
        # To this tokenizer these are one character each: a token begins before it or ends after it.
        first = np.arange(len(text) + 1)
        after = first.copy()
        for start, end in joined:
            first[start + 1 : end], after[start + 1 : end] = start, end
        starts, ends = first[starts], after[ends]
    return np.stack([starts, ends], axis=1)


def _count_dropped(
    tokenizer: Tokenizer,
    text: str,
    starts: Int[np.ndarray, " n"],
    ends: Int[np.ndarray, " n"],
    strings: Sequence[str],
) -> None:
    """Of a byte-level tokenizer that has dropped bytes, count the others, in place."""
    lengths = np.array([len(string) for string in strings], dtype=np.int64)
    n_letters, encoded = int(lengths.sum()), text.encode()
    if n_letters >= len(encoded) or "ByteLevel" not in repr(tokenizer.pre_tokenizer):
        return
    known = {
        byte for byte in set(encoded) if tokenizer.token_to_id(_LETTER_OF_BYTE[byte]) is not None
    }
    character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    character = character[[byte in known for byte in encoded]]
    # They differ too where a normalizer has made other text of it.
    if len(character) == n_letters:
        last = np.cumsum(lengths)
        starts[:], ends[:] = character[last - lengths], character[last - 1] + 1


def _untrim(
    text: str, starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], strings: Sequence[str]
) -> None:
    """Give a byte-level token the spaces at its end back, in place."""
    followed_by = np.append(starts[1:], len(text))[: len(ends)]
    for i in map(int, np.flatnonzero(followed_by > ends)):
        end, string = int(ends[i]), strings[i]
        n_spaces = len(string) - len(string.rstrip(SPACE))
        if n_spaces and text[max(end - 1, 0) : end] not in (" ", SPACE):
            ends[i] += n_spaces * text.startswith(" " * n_spaces, end)


def _part_bytes(
    text: str, starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], strings: Sequence[str]
) -> None:
    """Give each byte of a row of unknown characters the one that it is of, in place."""
    same = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1]) & (ends[1:] - starts[1:] > 1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same, [0]])))
    for first, last in edges.reshape(-1, 2).tolist():
        row = text[starts[first] : ends[first]]
        letters = [f"<0x{byte:02X}>" for byte in row.encode()]
        if letters == list(strings[first : last + 1]):
            of = np.repeat(np.arange(len(row)), [len(c.encode()) for c in row]) + starts[first]
            starts[first : last + 1], ends[first : last + 1] = of, of + 1


def _joined(normalizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Characters with marks on them of which the normalizer makes something else than the character alone."""
    if normalizer is None or text.isascii():
        return
    marks = "".join(c for c in set(text) if _may_join(c))
    if not marks:
        return
    # Some normalizers put something in front of all they read.
    in_front = normalizer.normalize_str("a")[:-1]
    for cluster in re.finditer(f"(?s:.)[{re.escape(marks)}]+", text):
        made, made_alone = (
            normalizer.normalize_str(part).removeprefix(in_front)
            for part in (cluster[0], cluster[0][0])
        )
        if made not in (made_alone, cluster[0], cluster[0].replace(" ", "▁")):
            yield cluster.span()


def _may_join(character: str) -> bool:
    """Whether normalizing may change what is before this character, or what is before and after it.

    Marks and parts of a Korean syllable; what this Python's Unicode does not know, since the tokenizer's
    may; and what some normalizers drop first, so that marks behind it come to what is before.
    """
    return (
        (unicodedata.category(character)[0] in "MC" and not character.isspace())
        or character == "\ufffd"
        or "\u1160" <= character <= "\u11ff"
        or "\u3131" <= character <= "\u318e"
        or "\ud7b0" <= character <= "\ud7ff"
        or "\uff9e" <= character <= "\uffdc"
    )
