"""Whether a data set somewhere else is the one that was read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text import fingerprints
from sae_lens_dfc.data.text.fingerprints import fingerprint_of_files, fingerprint_of_rows

TEXTS = [f"Text number {i}, ラーメン." for i in range(200)]


def written(path: Path, texts: list[str], **others: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text, **others}) for text in texts))
    return str(path)


def sign(path: str | Path, **settings: Any) -> dict[str, Any]:
    return Source.open(SourceConfig(str(path), **settings)).fingerprint


def test_the_same_rows_have_one_fingerprint_wherever_and_in_whatever_form_they_are(
    tmp_path: Path,
) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    found = [
        sign(written(tmp_path / "one.jsonl", TEXTS)),
        sign(written(tmp_path / "elsewhere" / "two.jsonl", TEXTS, id=7), text_column="text"),
        sign(tmp_path / "rows.parquet"),
        sign(tmp_path / "saved"),
    ]
    assert all(one == found[0] for one in found) and found[0]["rows"] == 200


@pytest.mark.parametrize("changed", [0, 77, 199])
def test_one_letter_in_any_row_makes_another_fingerprint(changed: int, tmp_path: Path) -> None:
    other = [text.replace("T", "t") if i == changed else text for i, text in enumerate(TEXTS)]
    before = sign(written(tmp_path / "one.jsonl", TEXTS))
    after = sign(written(tmp_path / "two.jsonl", other))
    assert before["rows"] == after["rows"] and before["content"] != after["content"]


def test_the_order_and_the_number_of_rows_are_in_the_fingerprint(tmp_path: Path) -> None:
    signs = [
        sign(written(tmp_path / f"{i}.jsonl", texts))
        for i, texts in enumerate([TEXTS, TEXTS[::-1], [*TEXTS, TEXTS[0]], TEXTS[:-1]])
    ]
    assert len({one["content"] for one in signs}) == 4


def test_other_kinds_of_documents_are_told_apart_by_their_content() -> None:
    chats = [[[{"role": "user", "content": c}]] for c in "ab"]
    signs = [fingerprint_of_rows(Dataset.from_dict({"m": chat}), ["m"]) for chat in chats]
    signs += [fingerprint_of_rows(Dataset.from_dict({"m": [[i, 2]]}), ["m"]) for i in (1, 3)]
    assert len({one["content"] for one in signs}) == 4


@pytest.mark.slow
def test_of_many_rows_some_are_read_from_the_first_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprints, "MAX_ROWS", 100)
    monkeypatch.setattr(fingerprints, "STRETCH", 10)

    def content(*changed: int) -> str:
        texts = [text + "!" * (i in changed) for i, text in enumerate(TEXTS)]
        return fingerprint_of_rows(Dataset.from_dict({"text": texts}), ["text"])["content"]

    whole = content()
    assert content(0) != whole and content(199) != whole
    assert sum(content(i) != whole for i in range(200)) == 100


def test_every_process_has_the_fingerprint_of_the_whole_text(tmp_path: Path) -> None:
    source = Source.open(SourceConfig(written(tmp_path / "one.jsonl", TEXTS)))
    assert [source.share(rank, 3).fingerprint for rank in range(3)] == [source.fingerprint] * 3


# --- a folder that is read as a stream ---


def folder(path: Path, *parts: list[str]) -> Path:
    for i, texts in enumerate(parts):
        written(path / f"part-{i}.jsonl", texts)
    return path


def test_a_folder_that_is_streamed_is_known_by_what_is_in_its_files(tmp_path: Path) -> None:
    one = sign(folder(tmp_path / "one", TEXTS[:90], TEXTS[90:]))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert sign(tmp_path / "two") == one and one["files"] == 2
    other = [*TEXTS[:150], TEXTS[150].replace("T", "t"), *TEXTS[151:]]
    assert sign(folder(tmp_path / "3", other[:90], other[90:]))["bytes"] == one["bytes"]
    assert sign(tmp_path / "3")["content"] != one["content"]
    assert sign(folder(tmp_path / "4", TEXTS[:91], TEXTS[91:]))["content"] != one["content"]
    # Read as a table its rows are known, but a place in it is no place in the stream.
    assert "rows" in sign(tmp_path / "one", streaming=False)


@pytest.mark.slow
def test_of_large_files_pieces_are_read_and_every_size_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "PIECE", 10)
    monkeypatch.setattr(fingerprints, "MAX_BYTES", 500)
    monkeypatch.setattr(fingerprints, "MAX_PIECES", 20)
    path = tmp_path / "large"

    def content(*changed: int, size: int = 1000) -> str:
        path.write_bytes(bytes(i in changed for i in range(size)))
        return fingerprint_of_files([path])["content"]

    whole = content()
    assert whole not in (content(size=1001), content(0), content(999))
    assert sum(content(i) != whole for i in range(1000)) == 200
    monkeypatch.setattr(fingerprints, "MAX_BYTES", 1000)
    whole = content()
    assert all(content(i) != whole for i in range(1000))
