"""Reads a data set's columns as stored: decodes JSON in them, and does not open images or audio."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset, LargeList, List

# Keys of a message's content in the two supported chat formats (`messages.py`).
SAID = ("content", "value")
# Older versions of datasets have no JSON type.
JSON: type | tuple[()] = getattr(datasets, "Json", ())


def as_stored(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the data set with its rows as one-row Arrow tables, for `row_of`, and without columns
    that hold only media.

    Decoding a row with an image or audio would open, or download, the file at its path; in Arrow
    format nothing is decoded. Arrow format also marks which values are JSON, whereas the decoding
    of datasets would parse any text that happens to be valid JSON, such as the answer 42.

    Raises:
        ValueError: All columns hold only media.
    """
    features = dataset.features
    if features is not None and any(map(_is_media, _leaves(features))):
        if isinstance(dataset, IterableDataset):
            # For a streamed data set, datasets opens images in threads, whichever columns are
            # selected.
            dataset = dataset.decode(False)
        kept = [name for name, one in features.items() if not all(map(_is_media, _leaves(one)))]
        if not kept:
            raise ValueError(
                f"it has no text: its columns {list(features)} hold images, audio or other files."
            )
        dataset = dataset.select_columns(kept)
    return dataset.with_format("arrow")


def _leaves(feature: Any) -> Iterator[Any]:
    """The leaf types of a column, or of all columns."""
    if isinstance(feature, Mapping):
        for one in feature.values():
            yield from _leaves(one)
    elif isinstance(feature, list | tuple):
        yield from _leaves(feature[0])
    elif isinstance(feature, List | LargeList):
        yield from _leaves(feature.feature)
    else:
        yield feature


def _is_media(feature: Any) -> bool:
    return hasattr(feature, "decode_example") and not isinstance(feature, JSON)


def row_of(table: Any) -> dict[str, Any]:
    """Convert the single row of an Arrow table to Python values.

    Raises:
        ValueError: A value that is marked as JSON is not valid JSON.

    >>> row_of(pa.table({"text": ["a"], "n": [1]}))
    {'text': 'a', 'n': 1}
    """
    [row] = table.to_pylist()
    for field in table.schema:
        if _holds_json(field.type):
            row[field.name] = _decoded(row[field.name], field.type)
    return row


@lru_cache(maxsize=256)
def _holds_json(kind: Any) -> bool:
    if _is_json(kind):
        return True
    if pa.types.is_struct(kind):
        return any(_holds_json(field.type) for field in _fields(kind))
    return _is_list(kind) and _holds_json(kind.value_type)


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _is_list(kind: Any) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _fields(kind: Any) -> list[Any]:
    return [kind.field(i) for i in range(kind.num_fields)]


def _decoded(value: Any, kind: Any, name: str = "") -> Any:
    """Decode the JSON in a value; `name` is the field that holds it."""
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return _of_json(value, is_said=name in SAID)
    if _is_list(kind):
        return [_decoded(one, kind.value_type) for one in value]
    return {f.name: _decoded(value[f.name], f.type, f.name) for f in _fields(kind)}


def _of_json(stored: str, is_said: bool) -> Any:
    """Decode a value stored as JSON; a message's content is kept as text unless it is a list of
    parts.

    If only some values of a column are text, datasets stores all of them as JSON, except text that
    is already valid JSON, which it stores unchanged. So `42` may be a number or a text and is read
    as text, and so is `{"a": 1}` as a message's content. (datasets has already removed the quotes
    of a quoted text.)
    """
    value = json.loads(stored)
    if isinstance(value, str) or (isinstance(value, dict | list) and not is_said):
        return value
    is_parts = isinstance(value, list) and all(isinstance(p, dict) and "type" in p for p in value)
    return value if is_parts else stored
