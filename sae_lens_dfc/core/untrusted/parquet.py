"""Checks the uncompressed size of a Parquet file before it is read: a megabyte can expand to
gigabytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet

from sae_lens_dfc.core.untrusted.arrow import MAX_ROWS_OF_A_BYTE, check_unpacked

BYTES_OF_A_NUMBER = 8
ROWS_AT_ONCE = 10_000


def check_parquet(path: Path) -> None:
    """Refuse a file that expands to far more than its bytes, by rows without data,
    dictionary-encoded long texts, or extreme compression.

    Raises:
        ValueError: It does.
        OSError: It cannot be read.
    """
    described = parquet.read_metadata(path)
    size = path.stat().st_size
    if described.num_rows > MAX_ROWS_OF_A_BYTE * size:
        raise ValueError(f"it claims {described.num_rows:,} rows in {size:,} bytes.")
    n_bytes, by_number, at_most = 0, set[str](), 0
    for chunk in _chunks(described):
        if min(chunk.total_uncompressed_size, chunk.num_values) < 0:
            raise ValueError("it has a column of fewer than no bytes.")
        if not chunk.physical_type.endswith("BYTE_ARRAY"):
            n_bytes += max(chunk.total_uncompressed_size, BYTES_OF_A_NUMBER * chunk.num_values)
            continue
        n_bytes += chunk.total_uncompressed_size
        if any("DICTIONARY" in encoding for encoding in chunk.encodings):
            by_number.add(chunk.path_in_schema)
            at_most += chunk.total_uncompressed_size * chunk.num_values
    check_unpacked(n_bytes, size)
    try:
        check_unpacked(n_bytes + at_most, size)
    except ValueError:  # as ordinary text may, whose dictionary was dropped: count
        check_unpacked(n_bytes + _written_out(path, sorted(by_number), size), size)


def _chunks(described: Any) -> Iterator[Any]:
    for group in range(described.num_row_groups):
        for column in range(described.num_columns):
            yield described.row_group(group).column(column)


def _written_out(path: Path, columns: list[str], size: int) -> int:
    """Total bytes of the columns' values, with each dictionary entry counted as often as it is
    used, without expanding any value."""
    n_bytes = 0
    with parquet.ParquetFile(path, read_dictionary=columns) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            for column in batch.columns:
                n_bytes += sum(_bytes_of(leaf) for leaf in _leaves(column))
            check_unpacked(n_bytes, size)
    return n_bytes


def _leaves(array: Any) -> Iterator[Any]:
    if isinstance(array, pa.StructArray):
        for field in array.flatten():
            yield from _leaves(field)
    elif pa.types.is_nested(array.type):
        yield from _leaves(array.flatten())
    else:
        yield array


def _bytes_of(array: Any) -> int:
    if not isinstance(array, pa.DictionaryArray):
        return array.nbytes
    lengths = compute.call_function("binary_length", [array.dictionary]).cast(pa.int64())
    return compute.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
