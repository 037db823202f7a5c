"""Text of unknown origin on a terminal, which takes some characters for orders."""

import re

# Controls but line end and tab; what turns the direction of text, or cannot be seen; and what no encoding has bytes for.
ORDERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with its orders to a terminal spelled out, as JSON would: JSON stays JSON, of the same meaning.

    >>> print(printable("a\x1b[2Jb\u202e"))
    a\u001b[2Jb\u202e
    """
    return ORDERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
