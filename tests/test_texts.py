import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_dfc.texts import clean, cpython_docs, load_texts, open_rows, split_text


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
        load_texts(str(tmp_path / "d.jsonl"), split="nosuch")


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


def test_cpython_docs_repeat_no_long_paragraph() -> None:
    paragraphs = [p for text in cpython_docs() for p in text.split("\n\n") if len(p) >= 80]
    assert len(paragraphs) == len(set(paragraphs))


def test_cpython_docs_are_enough_for_the_demo() -> None:
    # The demo reads 108,000 pairs at about 4.5 characters each.
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
    assert list(load_texts(path, streaming=streaming)) == ["learnt"]
    assert list(load_texts(path, split="test", streaming=streaming)) == ["held out"]


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
    assert list(load_texts(str(tmp_path), streaming=False)) == ["one"]
    assert list(load_texts(str(tmp_path), streaming=False, dataset_name="fr")) == ["un"]
    with pytest.raises(ValueError, match=r"its configurations are \['en', 'fr'\]"):
        load_texts(str(tmp_path), dataset_name="de")


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
