"""What a data set stores: JSON is taken apart, and media are left alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.table import InMemoryTable

from sae_lens_dfc.data.text.columns import row_of
from sae_lens_dfc.data.text.datasets import Rows, open_rows

needs_json = pytest.mark.skipif(
    not hasattr(datasets, "Json"), reason="this version of datasets has no type for JSON"
)


def read(rows: Rows) -> list[dict[str, Any]]:
    return [row for row, _ in rows.read()]


def of_json(texts: list[str | None]) -> Any:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


@needs_json
def test_json_is_taken_apart_wherever_it_is_stored() -> None:
    stored = of_json(['{"a": [1, null]}', None, '"x"', "[2]"])
    whole, inside = pa.table({"c": stored}), pa.ListArray.from_arrays([0, 4], stored)
    values = [{"a": [1, None]}, None, "x", [2]]
    assert [row_of(whole.slice(i, 1))["c"] for i in range(4)] == values
    assert row_of(pa.table({"c": inside})) == {"c": values}
    struct = pa.StructArray.from_arrays([inside], ["d"])
    assert row_of(pa.table({"c": struct})) == {"c": {"d": values}}


@needs_json
@pytest.mark.parametrize("name", ["content", "value"])
@pytest.mark.parametrize("said", ["42", "true", "null", "1.50", '{"a":  1}', "[1, 2]", "[]x", "x"])
def test_what_a_message_says_stays_the_text_that_it_was(said: str, name: str) -> None:
    # As datasets stores it, where other messages of the column are in parts.
    try:
        json.loads(said)
        stored = said
    except ValueError:
        stored = json.dumps(said)
    message = pa.StructArray.from_arrays([of_json([stored])], [name])
    assert row_of(pa.table({"m": message})) == {"m": {name: said}}


@needs_json
def test_a_message_in_parts_has_its_parts() -> None:
    parts = [{"type": "text", "text": "a"}]
    message = pa.StructArray.from_arrays([of_json([json.dumps(parts)])], ["content"])
    assert row_of(pa.table({"m": message})) == {"m": {"content": parts}}


@needs_json
@pytest.mark.parametrize("stored", ["{", "[" * 100_000])
def test_what_is_called_json_and_is_none_is_the_datas_fault(stored: str) -> None:
    table = pa.table({"c": of_json(['"x"', stored])})
    with pytest.raises(ValueError, match="Could not read data set 'theirs': "):
        read(Rows(Dataset(InMemoryTable(table)), "theirs"))


def image_rows(folder: Path) -> Dataset:
    """Chats in which a picture is named that is none, and a column of such."""
    (folder / "secret.png").write_text("not to be opened")
    one = {"path": str(folder / "secret.png"), "bytes": None}
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    part = pa.struct({"type": pa.string(), "text": pa.string(), "image": picture})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    says = [
        {"type": "image", "text": None, "image": one},
        {"type": "text", "text": "What?", "image": None},
    ]
    chat = [{"role": "user", "content": says}]
    table = pa.table(
        {"messages": [chat, chat], "shown": [one, one]},
        schema=pa.schema({"messages": pa.list_(message), "shown": picture}),
    )
    of_part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    of_message = {"role": Value("string"), "content": List(of_part)}
    features = Features({"messages": List(of_message), "shown": Image()})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    return Dataset(InMemoryTable(table))


def test_pictures_in_messages_are_not_opened_and_the_messages_are_kept(tmp_path: Path) -> None:
    rows = image_rows(tmp_path)
    (tmp_path / "d").mkdir()
    rows.to_parquet(str(tmp_path / "d" / "train.parquet"))
    streamed = open_rows(str(tmp_path / "d"))
    assert isinstance(streamed.dataset, IterableDataset)
    for found in (Rows(rows, "mine"), streamed, streamed.share(0, 2)):
        assert found.columns == ["messages"]
        parts = read(found)[0]["messages"][0]["content"]
        assert [part["type"] for part in parts] == ["image", "text"]


@needs_json  # as a sign of versions that do so of their own accord
def test_pictures_that_threads_would_open_ahead_are_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(Image, "decode_example", lambda _, one, **__: opened.append(one))

    def names() -> Iterator[dict[str, Any]]:
        yield {"text": "a", "shown": {"path": "/no/picture.png", "bytes": None}}

    features = Features({"text": Value("string"), "shown": Image()})
    rows: Any = IterableDataset.from_generator(names, features=features)
    # As datasets does to those on the hub.
    assert read(Rows(rows.decode(num_threads=2), "mine")) == [{"text": "a"}]
    assert opened == []


def test_a_set_of_nothing_but_pictures_is_not_called_empty(tmp_path: Path) -> None:
    pictures = image_rows(tmp_path).select_columns("shown")
    with pytest.raises(ValueError, match=r"it has no text: its columns \['shown'\] hold images"):
        Rows(pictures, "mine")
