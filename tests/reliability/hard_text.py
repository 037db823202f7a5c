"""Text that breaks things, without end: a fixed seed gives the same strings everywhere Unicode is
the same."""

import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

ZWJ, EMOJI_STYLE, KEYCAP = "\u200d", "\ufe0f", "\u20e3"
WHITESPACE = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2002\u2003\u2007\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\x00\x01\x07\x08\x1b\x7f\x80\x9f\xad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2064\u2066\u2067\u2068\u2069\ufeff\ufff9\ufffc\ufffd\U000e0001\U000e007f"
NONCHARACTERS = "\ufdd0\ufdef\ufffe\uffff\U0001fffe\U0010ffff"
SURROGATES = "\ud800\udbff\udc00\udc80\udcff\udfff"
FAMILIES = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👨🏿‍🚀", "🇫🇷", "🇫", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "1️⃣", "❤️", "🤖", "☝🏽"]
# Spellings that tokenizers have a meaning for.
SPELLED = ["<s>", "</s>", "<unk>", "[UNK]", "[CLS]", "<pad>", "<|endoftext|>", "<|im_start|>", "<bos>", "<0xE6>", "<0x3C>", "<0x0A>", "▁", "▁▁", "##", "##s", "Ġ", "ĠĠ", "Ċ", "Â©"]  # fmt: skip
WORDS = ["The", "cat", "sat", "on", "the", "mat.", "1989", "if", "x:", "naïve", "café", "Straße", "ÇA", "İstanbul", "ΣΑΣ", "ŀ", "ŉ", "ラーメンを食べる", "日本語と", "שלום", "עולם", "مرحبا", "हिन्दी", "ไทย", "Việt", "한국어"]  # fmt: skip
INDENTED = ["\n    y", "\n  \n", "\r\n\t", "  ", "\n", "\r\n", "\n\n   ", " \n "]


@cache
def code_points() -> list[list[str]]:
    """The characters of every Unicode block but surrogates: rows of sixteen, those unassigned left
    out."""
    rows = [[chr(code) for code in range(row, row + 16)] for row in range(0, sys.maxunicode, 16)]
    rows = [[c for c in row if unicodedata.category(c) not in ("Cn", "Cs")] for row in rows]
    # Of the large blocks, where one character is much like another, every 40th row.
    plain = {"Lo", "Co"}
    kinds = [{unicodedata.category(c) for c in row} for row in rows]
    large = [i > 0x300 and kind <= plain for i, kind in enumerate(kinds)]
    return [row for i, row in enumerate(rows) if row and (not large[i] or i % 40 == 0)]


@cache
def marks() -> str:
    return "".join(c for row in code_points() for c in row if unicodedata.combining(c))


@cache
def expanding() -> list[str]:
    """Characters that become several when normalized or put in lower case."""
    assigned = [c for row in code_points() for c in row]
    return [c for c in assigned if max(len(unicodedata.normalize("NFKC", c)), len(c.lower())) > 1]


@cache
def composed() -> list[str]:
    """Characters that canonical decomposition takes apart, each in its parts."""
    assigned = [c for row in code_points() for c in row]
    return [parts for c in assigned if len(parts := unicodedata.normalize("NFD", c)) > 1]


def _bytes_mapped_in(draw: random.Random) -> str:
    """Invalid UTF-8, as Python's file system functions, the web and Windows make text of it."""
    raw = draw.choice(["naïve 日本🤖", "\ufeffé", "ﷺ½"]).encode()
    raw = bytes(
        draw.choice([*raw[draw.randrange(len(raw)) :], draw.randrange(256)]) for _ in range(5)
    )
    encoding, errors = draw.choice(
        [("utf-8", "surrogateescape"), ("utf-8", "replace"), ("latin-1", "strict"), ("utf-16", "replace"), ("cp1252", "replace")]
    )  # fmt: skip
    return raw.decode(encoding, errors)


def _stack(draw: random.Random) -> str:
    n = draw.choice([1, 2, 2, 3, 5, 40])
    return draw.choice("eqE<日 ") + "".join(draw.choice(marks()) for _ in range(n))


def _jamo(draw: random.Random) -> str:
    first, vowel, last = draw.choice("ᄀᄒㄱﾡ"), draw.choice("ᅡᅵￂ"), draw.choice(["", "ᆨ", "ᇂ"])
    return draw.choice([first + vowel + last, "가" + last, "ｶﾞ", "ﾊﾟ", "か\u3099"])


def _any(draw: random.Random) -> str:
    row = draw.choice(code_points())
    return "".join(draw.choice(row) for _ in range(draw.randint(1, 4)))


SOURCES: list[Callable[[random.Random], str]] = [
    _any,
    _any,
    _bytes_mapped_in,
    _stack,
    _jamo,
    lambda draw: draw.choice(expanding()),
    lambda draw: draw.choice(composed()),
    lambda draw: draw.choice(FAMILIES),
    lambda draw: ZWJ.join(draw.choices("👩🤖a日", k=draw.randint(2, 5))) + EMOJI_STYLE + KEYCAP,
    lambda draw: "".join(draw.choices(WHITESPACE, k=draw.randint(1, 6))),
    lambda draw: draw.choice(INDENTED),
    lambda draw: draw.choice(INVISIBLE + NONCHARACTERS + SURROGATES),
    lambda draw: draw.choice(SPELLED),
    lambda draw: draw.choice(WORDS),
    lambda draw: draw.choice(WORDS),
    lambda draw: str(draw.getrandbits(draw.choice([4, 30, 200]))),
    lambda draw: draw.choice("a e日🤖\u0301½") * draw.choice([2, 3, 17]),
]


def _swapped(draw: random.Random, text: str) -> str:
    i, j = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    return text[:i] + text[i:j][::-1] + text[j:]


CHANGES: list[Callable[[random.Random, str], str]] = [
    _swapped,
    lambda draw, text: text[draw.randrange(len(text) + 1) :],
    lambda draw, text: text.replace(draw.choice(text or "a"), draw.choice(SURROGATES + "\x00 ½")),
    lambda draw, text: draw.choice([str.upper, str.lower, str.title])(text),
    lambda draw, text: unicodedata.normalize(draw.choice(["NFC", "NFD", "NFKC", "NFKD"]), text),
    lambda draw, text: text + text[: draw.randrange(len(text) + 1)],
]


def hard_texts(seed: int) -> Iterator[str]:
    """One after another, most of them short; every hundredth up to some hundred characters.

    Each also holds a character of the next row of `code_points`, so that 10,000 go through all
    blocks.
    """
    draw = random.Random(seed)
    rows = code_points()
    at = draw.randrange(len(rows))
    while True:
        n_parts = draw.choice([0, 1, 1, 2, 2, 3, 4]) if draw.random() < 0.99 else 30
        parts = [draw.choice(SOURCES)(draw) for _ in range(n_parts)]
        parts.insert(draw.randrange(n_parts + 1), draw.choice(rows[at % len(rows)]))
        text = draw.choice(["", "", " "]).join(parts)
        if draw.random() < 0.3:
            text = draw.choice(CHANGES)(draw, text)
        yield text
        at += 1
