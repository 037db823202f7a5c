"""An Arrow file's messages, looked at before anybody reads what they hold: compressed, a kilobyte of them stands for gigabytes."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

MAX_ROWS_OF_A_BYTE = 10
MAX_BYTES_OF_A_BYTE = 100
"""Unpacked: text takes a third to a tenth, logs and templates a thirtieth; what is made to be large, a thousandth and less."""
SMALL = 64_000_000
"""Bytes, unpacked, of which nobody needs to be protected."""

# Fields of the tables of Arrow's Message.fbs, by their place.
HEADER = 2
LENGTH, COMPRESSION = 0, 3
DATA_OF_A_DICTIONARY = 1


def check_arrow(path: Path) -> None:
    """Refuse a stream of Arrow that holds more than its bytes: compressed buffers, rows of nothing, long values by their number.

    Raises:
        ValueError: It does, or is no such stream.
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
    """Refuse so many bytes from a file of that size.

    Raises:
        ValueError: They are far more than honest text would make.
    """
    if n_bytes > MAX_BYTES_OF_A_BYTE * size + SMALL:
        raise ValueError(
            f"its {size:,} bytes can be {n_bytes:,} unpacked. Save its text without dictionaries or compression."
        )


class _Table:
    """A table of a flatbuffer, which Arrow has found to be sound."""

    def __init__(self, content: bytes, place: int):
        self.content = content
        self.place = place

    def place_of(self, field: int) -> int:
        """Where a field is; 0 where it is left out."""
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
    # Without a reader of batches, nothing is unpacked.
    for message in pa.ipc.MessageReader.open_stream(source):
        content = message.metadata.to_pybytes()
        root = _Table(content, int.from_bytes(content[:4], "little"))
        yield message, root.table(HEADER)
