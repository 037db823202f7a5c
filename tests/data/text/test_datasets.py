import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_dfc.core.untrusted.dataset_folder import files_in
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text.cleaning import clean, split_text
from sae_lens_dfc.data.text.cpython_docs import cpython_docs
from sae_lens_dfc.data.text.datasets import load_texts, open_rows
from sae_lens_dfc.data.text.messages import check_messages


def texts_in(path: str, **how: Any) -> list[str]:
    return [row["text"] for row, _ in open_rows(path, **how).read()]


@given(st.text(), st.integers(1, 20))
def test_pieces_join_to_the_text_and_none_is_too_long(text: str, max_chars: int) -> None:
    pieces = list(split_text(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


@given(st.text(st.characters(categories=["Cs", "L"])))
def test_cleaned_text_has_the_same_length_and_can_be_encoded(text: str) -> None:
    assert len(clean(text)) == len(text)
    clean(text).encode("utf-8")


def test_every_local_format_gives_the_same_documents(tmp_path: Path) -> None:
    documents = ["first", "second\nline"]
    Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "saved")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    Dataset.from_dict({"text": documents}).to_parquet(str(tmp_path / "d.parquet"))
    for name in ("saved", "d.jsonl", "d.parquet"):
        texts = load_texts(str(tmp_path / name))
        assert list(texts) == documents, name
        assert list(texts) == documents, f"{name} again"


def test_a_text_file_is_cut_into_documents_so_that_some_can_be_held_out(tmp_path: Path) -> None:
    text = "a line of text\n" * 2_000
    (tmp_path / "a.txt").write_text(text)
    documents = list(load_texts(str(tmp_path / "a.txt")))
    assert "".join(documents) == text
    assert len(documents) == 8


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\n")
    with pytest.raises(ValueError, match="no data"):
        load_texts(str(tmp_path / "d.csv"))


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="Could not read data set"):
        open_rows(str(tmp_path / "d.jsonl"), split="nosuch")


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    Dataset.from_dict({"content": ["x"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"no text column 'text'; its columns are \['content'\]"):
        load_texts(str(tmp_path / "d"))


def test_a_column_of_other_things_than_text_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": [[1, 2]]}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="Column 'text' holds list, not text"):
        list(load_texts(str(tmp_path / "d")))


def test_a_missing_text_is_an_empty_one(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "d")
    assert list(load_texts(str(tmp_path / "d"))) == ["a", ""]


def test_a_missing_data_set_is_named_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Could not read data set .*Give a hub name, a file"):
        load_texts(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.jsonl.gz", b"\x1f\x8b", "files that end in '.gz' are not read"),
        ("text.tsv", b"id\ttext\n1\ta\n", "files that end in '.tsv' are not read"),
        ("misspelled.jsonl", None, "there is no such file"),
        ("misspelled.txt", None, "there is no such file"),
    ],
)
def test_a_file_that_is_not_read_is_refused_and_no_hub_is_asked_for_it(
    name: str,
    content: bytes | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sae_lens_dfc.data.text.datasets.load_dataset", lambda *_, **__: pytest.fail("asked")
    )
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"Could not read data set '{name}': .*{reason}"):
        load_texts(name)


def test_a_data_set_without_a_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="A data set has no name"):
        load_texts("")


def test_a_data_set_that_is_a_script_is_refused_by_that_reason(tmp_path: Path) -> None:
    (tmp_path / "wikitext.py").write_text("raise SystemExit")
    message = r"scripts are no longer supported, but found wikitext\.py\. Give a hub name, a file"
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / "wikitext.py"))


@pytest.mark.slow
def test_cpython_docs_repeat_no_long_paragraph() -> None:
    paragraphs = [p for text in cpython_docs() for p in text.split("\n\n") if len(p) >= 80]
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.slow
def test_cpython_docs_are_enough_for_the_demo() -> None:
    # The benchmark's demo reads 108,000 pairs at about 4.5 characters each.
    assert sum(map(len, cpython_docs())) > 108_000 * 6


def write_table(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_dict({"text": [text]}).to_parquet(str(path))
    else:
        table = {".csv": f"text\n{text}\n", ".tsv": f"n\ttext\n1\t{text}\n", ".txt": text}
        path.write_text(table.get(path.suffix, json.dumps({"text": text}) + "\n"))


# Streamed, datasets leaves tables of commas open, which is a warning.
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-0.csv", "data/test-0.csv"),
        ("train/a.txt", "test/a.txt"),
        ("train.tsv", "test.tsv"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("my train [1] *.json", "test-?.json"),
    ],
)
def test_a_folder_of_files_has_the_splits_that_they_are_named_by(
    train: str, test: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "d" / train, "learnt")
    write_table(tmp_path / "d" / test, "held out")
    (tmp_path / "d" / "README.md").write_text("Mine.\n")
    (tmp_path / "d" / "train.png").write_bytes(b"png")
    path, streaming = str(tmp_path / "d"), ".json" in train
    assert texts_in(path, streaming=streaming) == ["learnt"]
    assert texts_in(path, split="test", streaming=streaming) == ["held out"]


CARD = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/*
- config_name: fr
  data_dir: fr
  sep: ";"
---
Text in two languages.
"""


def test_a_folder_has_the_configurations_that_its_card_names(tmp_path: Path) -> None:
    write_table(tmp_path / "en" / "a.csv", "one")
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr" / "a.csv").write_text("n;text\n1;un\n")
    (tmp_path / "README.md").write_text(CARD)
    assert texts_in(str(tmp_path), streaming=False) == ["one"]
    assert texts_in(str(tmp_path), streaming=False, dataset_name="fr") == ["un"]
    with pytest.raises(ValueError, match=r"its configurations are \['en', 'fr'\]"):
        open_rows(str(tmp_path), dataset_name="de")


def test_the_files_of_the_hubs_cache_are_links_that_are_followed(tmp_path: Path) -> None:
    write_table(tmp_path / "blobs" / "0a.jsonl", "text")
    folder = tmp_path / "snapshots" / "1b"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").symlink_to("../../blobs/0a.jsonl")
    assert list(load_texts(str(folder))) == ["text"]


def test_a_saved_format_does_not_change_what_is_read(tmp_path: Path) -> None:
    tokens = Dataset.from_dict({"text": ["a"], "input_ids": [[1, 2]]})
    tokens.with_format("numpy").save_to_disk(tmp_path / "d")
    [(row, _)] = open_rows(str(tmp_path / "d")).read()
    assert row == {"text": "a", "input_ids": [1, 2]}


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TEXT_PART = [{"type": "text", "text": "Who?"}, {"type": "text", "text": " Why?"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER_CALL = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
CHATS: dict[str, list[Any]] = {
    "plain": [[message("user", "Hi"), message("assistant", "42")], [message("user", "Who?")]],
    "a name in one message": [
        [message("user", "Hi", name="Ann"), message("assistant", "42")],
        [message("user", "Who?")],
    ],
    "in parts": [[message("user", TEXT_PART)], [message("user", TEXT_PART[:1])]],
    "some in parts": [
        [message("user", TEXT_PART), message("assistant", "42")],
        [message("user", "true"), message("assistant", '{"a":  1}')],
    ],
    "of ShareGPT": [
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "42", "weight": 1}],
        [{"from": "system", "value": "Be kind."}],
    ],
    "with calls": [
        [message("user", "Hi"), message("assistant", None, tool_calls=[CALL])],
        [message("assistant", None, tool_calls=[OTHER_CALL]), message("tool", "3", id="1")],
        [message("user", "Hi")],
    ],
    "with a picture": [
        [message("user", [{"type": "image", "url": "x.png"}, *TEXT_PART])],
        [message("user", TEXT_PART)],
    ],
}


def stored_forms(rows: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    """The same rows in files and folders of each kind."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (
        ("chats.jsonl", lines),
        ("list.json", json.dumps(rows)),
        ("lines/train.jsonl", lines),
        ("lists/train.json", json.dumps(rows)),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        yield str(folder / name if "train" not in name else (folder / name).parent)
    # What datasets makes of them keeps the types that it saw.
    made = Dataset.from_json(str(folder / "chats.jsonl"))
    assert isinstance(made, Dataset)
    made.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    made.to_parquet(str(folder / "parquet" / "train.parquet"))
    made.to_parquet(str(folder / "chats.parquet"))
    yield from (str(folder / name) for name in ("saved", "parquet", "chats.parquet"))


def normal(chat: Any) -> Any:
    try:
        return check_messages(chat)
    except ValueError as error:
        return str(error)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_the_same_in_every_form_that_stores_them(kind: str, tmp_path: Path) -> None:
    if kind == "some in parts" and not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no type for it")
    rows = [{"id": i, "chat": chat} for i, chat in enumerate(CHATS[kind])]
    expected = [normal(chat) for chat in CHATS[kind]]
    for path in stored_forms(rows, tmp_path):
        for streaming in (True, False):
            found = open_rows(path, streaming=streaming)
            assert found.columns == ["id", "chat"], path
            assert [normal(row["chat"]) for row, _ in found.read()] == expected, (path, streaming)


@pytest.mark.parametrize(
    ("names", "read", "left_out"),
    [
        (["a.jsonl", "b.jsonl", "c.parquet", "d.txt"], 2, "c.parquet, d.txt"),
        (["train.jsonl", "more.jsonl"], 1, "more.jsonl"),
        (["a.csv", "b.csv", "c.tsv"], 2, "c.tsv"),
        (["a.jsonl", "b.json", "README.md", "config.json"], 2, ""),
        (["train.jsonl", "test.jsonl"], 2, ""),
    ],
)
def test_a_folder_names_the_files_that_are_not_read(
    names: list[str], read: int, left_out: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}\n')
    listing = files_in(tmp_path)
    assert sum(len(one) for one in listing.files.values()) == read
    if left_out:
        assert f"left out ({left_out}):" in listing.note
    else:
        assert listing.note == ""


def test_opening_a_folder_of_several_kinds_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("one")
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "two"}\n')
    source = Source.open(SourceConfig(str(tmp_path)))
    assert [document for document, _ in source.read()] == ["two", "two"]
    assert source.note in caplog.messages and "1 left out (a.txt)" in source.note
