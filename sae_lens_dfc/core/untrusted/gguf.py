"""Checks the lengths in a GGUF file's header before the file is read, because the reader trusts
them."""

from collections.abc import Callable, Mapping
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

from sae_lens_dfc.core.terminal import said_by

# Size of a value in bytes, by its type number; the other types are strings and arrays.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
ANY_BLOCK = (8, 1)
"""Block of an unknown, newer type: at least one bit per element."""
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4


def check_gguf(path: Path) -> None:
    """Refuse a file whose header claims values, strings, arrays or tensors beyond its end.

    Raises:
        ValueError: It does, is not a GGUF file, or the package gguf is not installed.
        OSError: It cannot be read.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise ValueError(
            f"To read {path} needs the package gguf. Install it: pip install 'sae-lens-dfc[demo]'."
        ) from None
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            _walk(_Cursor(content), {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})
    except ValueError as error:
        raise ValueError(f"{path} is not a sound GGUF file: {said_by(error)}") from None


class _Cursor:
    """A position in a file that cannot move past its end."""

    def __init__(self, content: mmap):
        self.content = content
        self.place = 0

    def skip(self, n: int) -> None:
        if n > len(self.content) - self.place:
            raise ValueError(
                f"at byte {self.place:,} it claims {n:,} more bytes and has {len(self.content) - self.place:,}."
            )
        self.place += n

    def number(self, n_bytes: int) -> int:
        self.skip(n_bytes)
        return int.from_bytes(self.content[self.place - n_bytes : self.place], "little")

    def string(self) -> None:
        self.skip(self.number(8))

    def several(self, n: int, least: int, one: Callable[[], None]) -> None:
        """Read `n` items of at least `least` bytes each, after checking that all of them fit."""
        if n * least > len(self.content) - self.place:
            raise ValueError(
                f"at byte {self.place:,} it claims {n:,} things and has no room for them."
            )
        for _ in range(n):
            one()


def _walk(at: _Cursor, blocks: Mapping[int, tuple[int, int]]) -> None:
    """Check the header, given the elements and bytes of a block by the tensor's type."""
    magic, version = at.content[:4], at.content[4:8]
    if magic != b"GGUF" or int.from_bytes(version, "little") not in VERSIONS:
        raise ValueError(f"it begins with {magic!r}, version {version!r}.")
    at.skip(8)
    n_tensors, n_values = at.number(8), at.number(8)
    at.several(n_values, 13, lambda: _named_value(at))
    claims: list[tuple[int, int]] = []
    at.several(n_tensors, 24, lambda: claims.append(_tensor(at, blocks)))
    left = len(at.content) - at.place
    # Tensors must not share bytes either, because unpacking copies the bytes for each.
    claimed = max(sum(size for _, size in claims), max((sum(one) for one in claims), default=0))
    if claimed > left:
        raise ValueError(f"its tensors claim {claimed:,} bytes, and {left:,} follow.")


def _named_value(at: _Cursor) -> None:
    at.string()
    kind = at.number(4)
    n = 1
    if kind == ARRAY:
        kind, n = at.number(4), at.number(8)
    if kind == STRING:
        return at.several(n, 8, at.string)
    return at.skip(n * _size(kind))


def _size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"it has a value of kind {kind}.")
    return SIZES[kind]


def _tensor(at: _Cursor, blocks: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """Offset and size of a tensor, in bytes."""
    at.string()
    n_dimensions = at.number(4)
    if n_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"it has a tensor of {n_dimensions:,} dimensions.")
    n_numbers = prod(at.number(8) for _ in range(n_dimensions))
    numbers, n_bytes = blocks.get(at.number(4), ANY_BLOCK)
    return at.number(8), n_numbers * n_bytes // numbers
