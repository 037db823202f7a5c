"""Checks an Arrow file's messages before their data is read: compressed, a kilobyte can expand to
gigabytes."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

MAX_ROWS_OF_A_BYTE = 10
MAX_BYTES_OF_A_BYTE = 100
"""Maximum compression ratio: text compresses 3 to 10 times, logs and templates 30 times, and files
made to be large 1,000 times and more."""
SMALL_FILE = 64_000_000
"""Uncompressed size in bytes that is always allowed."""

# Field numbers in the tables of Arrow's Message.fbs.
HEADER = 2
LENGTH, COMPRESSION = 0, 3
DATA_OF_A_DICTIONARY = 1


def check_arrow(path: Path) -> None:
    """Refuse an Arrow stream that expands to far more than its bytes, by compressed buffers, rows
    without data, or dictionary-encoded long values.

    Raises:
        ValueError: It does, or is not an Arrow stream.
        OSError: It cannot be read.
    """
    size, n_rows, values = path.stat().st_size, 0, 0
    with pa.memory_map(str(path)) as source:
        for message, header in _messages(source):
            if message.type == "dictionary":
                header = header.table(DATA_OF_A_DICTIONARY)
                values = max(values, message.body.size)
            elif message.type == "record batch":
                n_rows += header.number(LENGTH)
            else:
                continue
            if header.place_of(COMPRESSION):
                raise ValueError(f"{path.name!r:.80} is compressed inside. Save it as it is.")
            if n_rows > MAX_ROWS_OF_A_BYTE * size:
                raise ValueError(f"{path.name!r:.80} claims {n_rows:,} rows in {size:,} bytes.")
    check_unpacked(n_rows * values, size)


def check_unpacked(n_bytes: int, size: int) -> None:
    """Refuse an uncompressed size of `n_bytes` for a file of `size` bytes.

    Raises:
        ValueError: It is far larger than ordinary text would give.
    """
    if n_bytes > MAX_BYTES_OF_A_BYTE * size + SMALL_FILE:
        raise ValueError(
            f"its {size:,} bytes can be {n_bytes:,} unpacked. Save its text without dictionaries or compression."
        )


class _Table:
    """A flatbuffer table that Arrow has verified."""

    def __init__(self, content: bytes, place: int):
        self.content = content
        self.place = place

    def place_of(self, field: int) -> int:
        """Offset of a field; 0 if it is absent."""
        fields = self.place - self._read("<i", self.place)
        if 4 + 2 * field >= self._read("<H", fields):
            return 0
        offset = self._read("<H", fields + 4 + 2 * field)
        return self.place + offset if offset else 0

    def table(self, field: int) -> "_Table":
        place = self.place_of(field)
        return _Table(self.content, place + self._read("<I", place))

    def number(self, field: int) -> int:
        place = self.place_of(field)
        return max(0, self._read("<q", place)) if place else 0

    def _read(self, kind: str, place: int) -> int:
        try:
            return struct.unpack_from(kind, self.content, place)[0]
        except struct.error:
            raise ValueError("its metadata leads out of itself.") from None


def _messages(source: Any) -> Iterator[tuple[Any, _Table]]:
    if source.read(6) == b"ARROW1":
        raise ValueError(
            "it is Arrow in the file format. Write it with save_to_disk, or as Parquet."
        )
    source.seek(0)
    # A message reader does not decompress batches.
    for message in pa.ipc.MessageReader.open_stream(source):
        content = message.metadata.to_pybytes()
        root = _Table(content, int.from_bytes(content[:4], "little"))
        yield message, root.table(HEADER)
