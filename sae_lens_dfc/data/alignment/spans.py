"""Corrects tokenizer offsets that omit or misplace characters of a token."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_LETTERS = sorted(ByteLevel.alphabet())
# Printable Latin-1 maps to itself, the other bytes in order to letters from U+0100 on.
_BYTES = sorted(range(256), key=lambda byte: (chr(byte) not in _LETTERS, byte))
_LETTER_OF_BYTE = dict(zip(_BYTES, _LETTERS, strict=True))
LETTER_OF_BYTE_TOKEN = {f"<0x{byte:02X}>": letter for byte, letter in _LETTER_OF_BYTE.items()}
"""Byte-level tokenizers' spelling of the byte-fallback tokens of other tokenizers."""

SPACE = "Ġ"


def true_spans(
    tokenizer: Tokenizer, text: str, spans: Int[np.ndarray, "tokens 2"], strings: Sequence[str]
) -> Int[np.ndarray, "tokens 2"]:
    """Start and end (exclusive) of the characters that each token contains.

    Corrects four kinds of wrong offsets, each off by a few characters: after a dropped byte that is
    not in the vocabulary, later bytes get the spans of earlier ones; bytes of several consecutive
    unknown characters all get the span of the whole run (unigram); spaces at a token's end are
    omitted (`trim_offsets` of byte-level tokenizers), and so are accents that a normalizer composes
    with their letter.

    Args:
        tokenizer: A tokenizer of the tokenizers library.
        text: The tokenized text.
        spans: The tokenizer's own offsets.
        strings: The tokens as spelled in its vocabulary.

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
        # The normalizer makes each cluster one character, so a token starts before it or ends after
        # it.
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
    """Recompute in place the spans of a byte-level tokenizer that has dropped bytes, by counting
    the others."""
    lengths = np.array([len(string) for string in strings], dtype=np.int64)
    n_letters, encoded = int(lengths.sum()), text.encode()
    if n_letters >= len(encoded) or "ByteLevel" not in repr(tokenizer.pre_tokenizer):
        return
    known = {
        byte for byte in set(encoded) if tokenizer.token_to_id(_LETTER_OF_BYTE[byte]) is not None
    }
    character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    character = character[[byte in known for byte in encoded]]
    # The counts also differ if a normalizer changed the text.
    if len(character) == n_letters:
        last = np.cumsum(lengths)
        starts[:], ends[:] = character[last - lengths], character[last - 1] + 1


def _untrim(
    text: str, starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], strings: Sequence[str]
) -> None:
    """Add trailing spaces back to byte-level tokens, in place."""
    followed_by = np.append(starts[1:], len(text))[: len(ends)]
    for i in map(int, np.flatnonzero(followed_by > ends)):
        end, string = int(ends[i]), strings[i]
        n_spaces = len(string) - len(string.rstrip(SPACE))
        if n_spaces and text[max(end - 1, 0) : end] not in (" ", SPACE):
            ends[i] += n_spaces * text.startswith(" " * n_spaces, end)


def _part_bytes(
    text: str, starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"], strings: Sequence[str]
) -> None:
    """Assign each byte in a run of unknown characters to its own character, in place."""
    same = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1]) & (ends[1:] - starts[1:] > 1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same, [0]])))
    for first, last in edges.reshape(-1, 2).tolist():
        row = text[starts[first] : ends[first]]
        letters = [f"<0x{byte:02X}>" for byte in row.encode()]
        if letters == list(strings[first : last + 1]):
            of = np.repeat(np.arange(len(row)), [len(c.encode()) for c in row]) + starts[first]
            starts[first : last + 1], ends[first : last + 1] = of, of + 1


def _joined(normalizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Spans of characters with combining marks that the normalizer composes."""
    if normalizer is None or text.isascii():
        return
    marks = "".join(c for c in set(text) if _may_join(c))
    if not marks:
        return
    # Some normalizers prepend a character to every text.
    in_front = normalizer.normalize_str("a")[:-1]
    for cluster in re.finditer(f"(?s:.)[{re.escape(marks)}]+", text):
        made, made_alone = (
            normalizer.normalize_str(part).removeprefix(in_front)
            for part in (cluster[0], cluster[0][0])
        )
        if made not in (made_alone, cluster[0], cluster[0].replace(" ", "▁")):
            yield cluster.span()


def _may_join(character: str) -> bool:
    """Whether normalization may merge this character with its neighbors.

    These are marks and parts of Korean syllables; characters that this Python's Unicode version
    does not know, because the tokenizer's may; and characters that some normalizers drop first, so
    that the marks after them attach to the character before.
    """
    return (
        (unicodedata.category(character)[0] in "MC" and not character.isspace())
        or character == "\ufffd"
        or "\u1160" <= character <= "\u11ff"
        or "\u3131" <= character <= "\u318e"
        or "\ud7b0" <= character <= "\ud7ff"
        or "\uff9e" <= character <= "\uffdc"
    )
