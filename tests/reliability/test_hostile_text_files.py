"""The command `align` on files that are no text, or strange text: one error that names the file, or
the right result."""

import json
from pathlib import Path

import pytest

from sae_lens_dfc.cli.main import main

REFUSED: dict[str, tuple[bytes, str]] = {
    "latin-1.txt": (b"caf\xe9 au lait", "is not text in UTF-8: invalid continuation byte at byte 3"),
    "utf-16.txt": ("the cat".encode("utf-16"), "is not text in UTF-8: invalid start byte at byte 0"),
    "binary.txt": (bytes(range(256)) * 40, "is not text in UTF-8: invalid start byte at byte 128"),
    "binary": (b"\x7fELF\xff\x00", "is not text in UTF-8: invalid start byte at byte 4"),
    "empty.txt": (b"", "has no paired position: 0 tokens of A, 0 of B"),
    "empty.jsonl": (b"", "is empty. Give one with text in it."),
    "empty.parquet": (b"", "is empty. Give one with text in it."),
    "latin-1.jsonl": (b'{"text": "caf\xe9"}\n', "is not text in UTF-8"),
    "encoded-surrogate.jsonl": (b'{"text": "a\xed\xa0\x80b"}\n', "is not text in UTF-8"),
    "surrogate.jsonl": (b'{"text": "a\\ud800b"}\n', "JSON parse error: The surrogate pair in string is invalid"),
    "cut-off.jsonl": (b'{"text": "a"}\n{"text": "b', "JSON parse error: Missing a closing quotation mark"),
    "binary.jsonl": (bytes(range(256)), "JSON parse error: The document is empty"),
    "deep.json": (b"[" * 100_000, "Could not read data set"),
    "numbers.jsonl": (b'{"text": 1}\n', "Column 'text' holds int, not text"),
    "nulls.jsonl": (b'{"text": null}\n', "has no paired position: 0 tokens of A, 0 of B"),
    "broken.parquet": (b"PAR1" + bytes(100), "Parquet magic bytes not found"),
    "open.csv": (b'text\n"abc\n', "EOF inside string"),
}  # fmt: skip

READ: dict[str, bytes] = {
    "nul.txt": b"a\0b\0c",
    "marked.txt": b"\xef\xbb\xbfthe cat",
    "crlf.txt": b"a\r\nb\r\n",
    "spaces.txt": " \t\n\u3000\u2028".encode(),
    "noncharacters.txt": "\uffff\ufdd0\U0010ffff".encode(),
    "nul.jsonl": b'{"text": "a\\u0000b"}\n',
    "surrogate.json": b'[{"text": "a\\ud800b the cat"}]',
}


def align_file(
    folder: Path, name: str, content: bytes, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    (folder / name).write_bytes(content)
    both = ["--tokenizer-a", str(tokenizer), "--tokenizer-b", str(tokenizer)]
    status = main(["align", *both, str(folder / name), "--json"])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_text_is_refused_with_one_error_that_says_why(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, why = REFUSED[name]
    status, out, err = align_file(tmp_path, name, content, llama_folder, capsys)
    errors = [line for line in err.splitlines() if "error:" in line]
    assert status == 1 and not out and len(errors) == 1 and "Traceback" not in err
    assert why in errors[0]
    assert name in errors[0] or "Column" in errors[0]


@pytest.mark.parametrize("name", READ)
def test_strange_text_is_read_to_its_last_character(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, out, _ = align_file(tmp_path, name, READ[name], llama_folder, capsys)
    counts = json.loads(out)
    assert status == 0 and counts["pairs"] == counts["tokens_a"] == counts["tokens_b"] > 0
