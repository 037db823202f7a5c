"""Fingerprints rows and files, to check that a data set that was moved is still the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from xxhash import xxh3_128

MAX_ROWS = 50_000
"""Maximum number of rows that are read, in a second or two; a longer data set is sampled evenly."""
STRETCH = 50
"""Number of rows read at once."""
MAX_BYTES = 1 << 30
"""Maximum size of files that are read completely, in about a second; larger ones are sampled
evenly."""
PIECE = 1 << 16
MAX_PIECES = MAX_BYTES // PIECE // 16


def fingerprint_of_rows(dataset: Dataset, columns: Sequence[str]) -> dict[str, Any]:
    """Fingerprint the number and content of rows, independent of their file, its format and its
    other columns.

    Args:
        dataset: The rows.
        columns: The columns that are read.

    >>> one, other = (Dataset.from_dict({"text": texts}) for texts in (["a", "bc"], ["ab", "c"]))
    >>> fingerprint_of_rows(one, ["text"]) == fingerprint_of_rows(other, ["text"])
    False
    """
    # In Arrow format, because nothing is decoded then.
    digest, rows = xxh3_128(), dataset.select_columns([*columns]).with_format("arrow")
    for start in _spread(len(rows), STRETCH, MAX_ROWS // STRETCH):
        stretch: Any = rows[start : start + STRETCH]
        for column in columns:
            for value in stretch[column].to_pylist():
                _take_in(digest, value)
    return {"rows": len(rows), "content": digest.hexdigest()}


def fingerprint_of_value(value: Any) -> str:
    """Fingerprint one value; different values have different fingerprints.

    >>> fingerprint_of_value("1") == fingerprint_of_value(1)
    False
    """
    digest = xxh3_128()
    _take_in(digest, value)
    return digest.hexdigest()


def _take_in(digest: xxh3_128, value: Any) -> None:
    is_text = isinstance(value, str)
    content = (value if is_text else repr(value)).encode("utf-8", "surrogatepass")
    digest.update(f"{is_text} {len(content)} ".encode())
    digest.update(content)


def fingerprint_of_files(paths: Sequence[Path]) -> dict[str, Any]:
    """Fingerprint the number, sizes and content of files, in the given order, independent of their
    names. It is used for files whose rows cannot be counted without reading them completely.

    Args:
        paths: The files to fingerprint.
    """
    sizes = [path.stat().st_size for path in paths]
    n_bytes = sum(sizes)
    digest = xxh3_128(repr(sizes).encode())
    for path, size in zip(paths, sizes, strict=True):
        n_pieces = size // PIECE + 1
        if n_bytes > MAX_BYTES:
            n_pieces = max(1, MAX_PIECES * size // n_bytes)
        with path.open("rb") as file:
            for start in _spread(size, PIECE, n_pieces):
                file.seek(start)
                digest.update(file.read(PIECE))
    return {"files": len(paths), "bytes": n_bytes, "content": digest.hexdigest()}


def _spread(n: int, stretch: int, at_most: int) -> Iterator[int]:
    """Starts of the stretches that cover `n`: all of them, or `at_most` spread evenly, including
    the last."""
    if n <= stretch * at_most:
        return iter(range(0, n, stretch))
    return (i * (n - stretch) // max(1, at_most - 1) for i in range(at_most))
