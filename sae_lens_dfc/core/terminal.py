"""Prints to a terminal: escapes control characters, shortens errors, lays out tables."""

import re
import sys
from functools import lru_cache

# Control characters except newline and tab; bidirectional and invisible characters; and lone
# surrogates, which cannot be encoded.
ORDERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# The same and more, without joiners, which scripts and emoji need.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
PICTURES = {"\n": "↵", "\t": "⇥", "\x7f": "␡", **{chr(i): chr(0x2400 + i) for i in range(9)}}
MOST_SAID = 300
"""Maximum length of another library's error message, in characters; some quote a whole page."""
MOST_OF_OURS = 2_000
"""Maximum length of an error that may be this package's own, in characters; its advice is at the
end."""
ENDS = (".", "?", "!", "…")

_NUMBER_OF_ERROR = re.compile(r"\[Errno -?\d+\] ")
_ITEM = re.compile(r"\s*\n\s*[-*•]\s+")
_NEW_SENTENCE = re.compile(r"(?<=[^\W_]|[\"'`)\]])[^\S\n]*\n\s*(?=[A-Z])")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")


def printable(text: str) -> str:
    r"""Escape control characters as JSON does before printing untrusted text; JSON keeps its
    meaning.

    >>> print(printable("a\x1b[2Jb\u202e"))
    a\u001b[2Jb\u202e
    """
    return ORDERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@lru_cache(maxsize=100_000)
def visible(text: str, keep_lines: bool = False) -> str:
    """Replace invisible and bidirectional control characters by visible symbols.

    >>> visible("a\\nb\\x00\\u202e")
    'a↵b␀⟨U+202E⟩'
    """

    def sign(match: re.Match[str]) -> str:
        char = match[0]
        if keep_lines and char == "\n":
            return char
        return PICTURES.get(char, f"⟨U+{ord(char):04X}⟩")

    return HIDDEN.sub(sign, text)


def print_result(text: str) -> None:
    """Print a line of a command's result to standard output; everything else goes to standard
    error.

    Raises:
        OSError: Standard output is closed, or its disk is full.
    """
    sys.stdout.write(printable(text) + "\n")
    # At Python's exit, an error would have another message and exit status.
    sys.stdout.flush()


def counted(n: int, noun: str) -> str:
    """Format a count with its noun.

    >>> counted(1, "step"), counted(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def said_by(error: BaseException, most: int = MOST_SAID) -> str:
    r"""Format an error as one line for use inside a message: shortened, and ended with punctuation.

    Args:
        error: An error, possibly of another library.
        most: Maximum number of characters.

    >>> said_by(ValueError("No such name; choose from:\n  - a\n  - b"))
    'No such name; choose from: a, b.'
    >>> said_by(KeyError("gemma9")), said_by(TimeoutError())
    ("'gemma9' is missing.", 'Timeout error.')
    """
    return sentence(_words_of(error).strip() or _name_of(error), most)


def sentence(text: str, most: int = MOST_SAID) -> str:
    """Format another library's message as `said_by` does."""
    said = _on_one_line(text)
    if len(said) > most:
        # Cut at a word boundary, if there is one.
        cut = said[: most - 1].rpartition(" ")[0] or said[: most - 1]
        return f"{cut.rstrip(' .,:;')}…"
    return said if said.endswith(ENDS) else f"{said.rstrip(' ,:;')}."


def _words_of(error: BaseException) -> str:
    if isinstance(error, KeyError) and len(error.args) == 1:
        # The text of a KeyError is the repr of its argument, which is a key or a message.
        [missing] = error.args
        is_message = isinstance(missing, str) and len(missing.split()) > 1
        return missing if is_message else f"{missing!r} is missing"
    return _NUMBER_OF_ERROR.sub("", str(error), count=1)


def _on_one_line(text: str) -> str:
    first, *others = _ITEM.split(text)
    listed = f"{first} {', '.join(others)}" if first.endswith(":") else ", ".join([first, *others])
    return " ".join(_NEW_SENTENCE.sub(". ", listed).split())


def _name_of(error: BaseException) -> str:
    first, *others = _WORD.findall(type(error).__name__) or ["Error"]
    return " ".join([first, *(word if word.isupper() else word.lower() for word in others)])


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table for the terminal.

    >>> print(text_table(["measure", "run"], [["L0", "31.50"]]))
    measure    run
    L0       31.50
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in [head, *rows]
    ]
    return "\n".join(lines)
