"""What a file claims is checked before memory is taken for it, and whatever is wrong with it is one
line."""

import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from pyarrow import parquet
from xxhash import xxh3_128

from benchmarks.suite import results_in
from sae_lens_dfc.analysis.autointerp.concerns import read_concerns
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.results import read_latents, read_metrics
from sae_lens_dfc.analysis.saved_run.held_out import run_config
from sae_lens_dfc.core.journal import Journal
from sae_lens_dfc.core.untrusted.gguf import check_gguf
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.text.datasets import load_texts, open_rows
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model, read_chat_template
from sae_lens_dfc.training.checkpoint import check_files
from tests.data.cache.test_cache import write
from tests.helpers import make_firing_dfc
from tests.reliability.hostile import (
    COMMANDS,
    NOT_JSON,
    TOO_LONG,
    changed_json,
    changed_tensors,
    copied,
    refusal,
    refused,
    safetensors_with,
)

WEIGHTS = "sae_weights.safetensors"
Spoil = Callable[[Path], None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_firing_dfc().save_model(tmp_path / "saved")
    return tmp_path / "saved"


def cfg(**changes: Any) -> Spoil:
    return lambda folder: changed_json(folder / "cfg.json", **changes)


def weights(**changes: Any) -> Spoil:
    return lambda folder: changed_tensors(folder / WEIGHTS, **changes)


def raw(content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)

    return spoil


def claim(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LARGE = 10**12
# Each with a word of the error.
SPOILED: dict[str, tuple[Spoil, str]] = {
    "a trillion latents": (cfg(d_sae=LARGE), "cfg.json expects (12, 1000000000000)"),
    "a trillion latents of one model": (
        cfg(d_sae=LARGE, n_a_exclusive=LARGE - 9),
        "cfg.json expects (12, 1000000000000)",
    ),
    "a width of a trillion": (
        cfg(d_in=LARGE + 5, d_a=5, d_b=LARGE),
        "cfg.json expects (1000000000005, 24)",
    ),
    "a negative width": (cfg(d_in=-12, d_a=-5, d_b=-7), "both at least 1"),
    "widths that cancel": (cfg(d_a=20, d_b=-8), "both at least 1"),
    "more exclusive latents than latents": (
        cfg(n_a_exclusive=30),
        "smaller than its exclusive partitions",
    ),
    "a size as text": (cfg(d_sae="24"), "d_sae must be a valid integer"),
    "a size with a point": (cfg(d_sae=24.0), "d_sae must be a valid integer"),
    "a size that is true": (cfg(d_a=True, d_b=11), "d_a must be a valid integer"),
    "no size": (cfg(d_sae=None), "d_sae must be a valid integer"),
    "a list as size": (cfg(d_in=[12]), "d_in must be a valid integer"),
    "beyond 64 bits": (cfg(d_sae=10**40), "more than 64 bits"),
    "a format that is none": (cfg(dtype="__import__"), "Invalid dtype"),
    "a format of another type": (cfg(dtype=["float32"]), "dtype must be a valid string"),
    "a normalization that is none": (
        cfg(normalize_activations="os"),
        "normalize_activations must be",
    ),
    "no metadata": (cfg(metadata=None), "must be a mapping"),
    "a list as metadata": (cfg(metadata=[["a", 1]]), "must be a mapping"),
    "metadata that replaces a class": (
        cfg(metadata={"__class__": "x"}),
        "cannot have the name '__class__'",
    ),
    "metadata that replaces a method": (cfg(metadata={"get": "x"}), "cannot have the name 'get'"),
    "another architecture": (cfg(architecture="standard"), "not a crosscoder"),
    "an architecture of another type": (cfg(architecture=["crosscoder"]), "not a crosscoder"),
    "weights of another width": (weights(W_enc=torch.zeros(11, 24)), "holds (11, 24) as W_enc"),
    "weights of no rows": (weights(W_enc=torch.zeros(0, 24)), "holds (0, 24) as W_enc"),
    "a tensor too many": (weights(scaling_factor=torch.ones(1)), "cfg.json expects nothing"),
    "a tensor too few": (weights(threshold=None), "holds nothing as threshold"),
    "weights as whole numbers": (
        weights(W_dec=torch.zeros(24, 12, dtype=torch.int64)),
        "W_dec as I64",
    ),
    "weights in 8 bits": (
        weights(W_dec=torch.zeros(24, 12, dtype=torch.float8_e4m3fn)),
        "W_dec as F8_E4M3",
    ),
    "a header of 2^60 bytes": (raw(struct.pack("<Q", 2**60)), "claims a header of"),
    "a header of 2^64 - 1 bytes": (raw(b"\xff" * 8), "claims a header of"),
    "10 GB in a kilobyte": (
        raw(safetensors_with({"W_enc": claim([50_000, 50_000], [0, 10**10])}, bytes(1000))),
        "not fully covered",
    ),
    "offsets that overlap": (
        raw(safetensors_with({"a": claim([2], [0, 8]), "b": claim([2], [4, 12])}, bytes(12))),
        "invalid offset",
    ),
    "offsets that run backwards": (
        raw(safetensors_with({"a": claim([2], [8, 0])}, bytes(8))),
        "invalid offset",
    ),
    "a shape that overflows": (
        raw(safetensors_with({"a": claim([2**40, 2**40], [0, 8])}, bytes(8))),
        "overflow",
    ),
    "a negative shape": (raw(safetensors_with({"a": claim([-2], [0, 8])}, bytes(8))), "is damaged"),
    "a header that is no JSON": (raw(struct.pack("<Q", 8) + b"\xff" * 8), "is damaged"),
    "nothing": (raw(b""), "is damaged"),
    "three bytes": (raw(b"abc"), "claims a header of"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_crosscoder_that_claims_what_it_has_not_is_refused(what: str, saved: Path) -> None:
    spoil, word = SPOILED[what]
    spoil(saved)
    assert word in refused(lambda: load_crosscoder(saved))


@pytest.mark.parametrize("what", NOT_JSON)
def test_what_is_not_a_configuration_is_refused(what: str, saved: Path) -> None:
    content, word = NOT_JSON[what]
    (saved / "cfg.json").write_bytes(content)
    message = refused(lambda: load_crosscoder(saved))
    assert "cfg.json" in message and word in message


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line(
    command: str, saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    cfg(d_sae=LARGE)(saved)
    assert "cfg.json expects" in refusal(capfd, command, saved, *COMMANDS[command])
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("what", NOT_JSON)
def test_what_is_not_the_settings_of_a_run_is_refused(what: str, tmp_path: Path) -> None:
    content, word = NOT_JSON[what]
    (tmp_path / "runner_cfg.json").write_bytes(content)
    message = refused(lambda: run_config(str(tmp_path), HeldOutOptions()))
    assert "runner_cfg.json" in message and word in message


@pytest.mark.parametrize("what", NOT_JSON)
def test_what_is_not_a_manifest_is_refused(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c").folder
    content, word = NOT_JSON[what]
    (folder / "manifest.json").write_bytes(content)
    message = refused(lambda: PairedActivationsCache(folder))
    assert "manifest.json" in message and word in message


@pytest.mark.parametrize("what", NOT_JSON)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metrics.json", lambda folder: read_metrics(folder / "metrics.json")),
        ("recovery.json", lambda folder: results_in(folder / "recovery.json")),
        ("checksums.json", check_files),
        ("p.jsonl", lambda folder: Journal(folder / "p.jsonl", {})),
    ],
)
def test_what_is_not_a_result_is_refused(
    name: str, read: Callable[[Path], Any], what: str, tmp_path: Path
) -> None:
    content, _ = NOT_JSON[what]
    (tmp_path / name).write_bytes(content + (b"\n" if name == "p.jsonl" else b""))
    if (name, what) == ("p.jsonl", "nothing"):
        read(tmp_path)  # as a full disk leaves it
    else:
        assert name in refused(lambda: read(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(lambda: read(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"latent,a\n" + b"1," * 30_000_000,
        b"latent,a\n" + b"1" * 60_000_000,
        b"latent," * 10_000_000 + b"\n",
        b"latent,a\n" + b"1,2\n" * 10_000_000,
        b'latent,a\n1,"' + b"2\n" * 10_000,
        bytes(range(256)),
        b"",
    ],
    ids=["cells", "a cell", "columns", "lines", "a cell that is left open", "bytes", "nothing"],
)
def test_a_table_of_latents_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "latents.csv").write_bytes(content)
    assert "latents.csv" in refused(lambda: read_latents(tmp_path / "latents.csv", 24))


def test_a_table_of_latents_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "latents.csv").symlink_to("/dev/zero")
    assert "is not a file" in refused(lambda: read_latents(tmp_path / "latents.csv", 24))


@pytest.mark.slow
def test_the_exit_status_of_a_process_is_1_and_there_is_no_traceback(saved: Path) -> None:
    cfg(d_sae=LARGE)(saved)
    command = [sys.executable, "-m", "sae_lens_dfc", "evaluate", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sae-lens-dfc: error: ")


# --- caches ---

SHARD = "rows-00000-000000.safetensors"


def manifest(**changes: Any) -> Spoil:
    return lambda folder: changed_json(folder / "manifest.json", **changes)


def first_shard(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        values["shards"][0].update(changes)
        values["rows"] = sum(shard["rows"] for shard in values["shards"])
        (folder / "manifest.json").write_text(json.dumps(values))

    return spoil


def all_one_shard(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    values["shards"] = [values["shards"][0]] * 100_000
    values["rows"] = sum(shard["rows"] for shard in values["shards"])
    (folder / "manifest.json").write_text(json.dumps(values))


CACHES: dict[str, tuple[Spoil, str]] = {
    "a trillion rows": (manifest(rows=LARGE), "do not add up to 1000000000000"),
    "a trillion rows in a shard": (first_shard(rows=LARGE), "too small for the rows of 28 bytes"),
    "a shard of a trillion bytes": (
        first_shard(rows=LARGE, size=LARGE * 28),
        "and 28000000000000 were written",
    ),
    "a shard of no rows": (first_shard(rows=0), "too small for the rows"),
    "a shard of fewer than no rows": (first_shard(rows=-5), "too small for the rows"),
    "rows with a point": (first_shard(rows=32.5), "rows is"),
    "a shard named a hundred thousand times": (all_one_shard, "no file of its kind has more"),
    "a shard with more to say": (first_shard(code="import os"), "has a setting 'code'"),
    "a shard with a number as its name": (first_shard(file=7), "file must be a valid string"),
    "no shards": (manifest(shards=[], rows=0), "too small for the rows"),
    "shards as text": (manifest(shards="rows"), "shards is 'rows'"),
    "a trillion shards": (manifest(shards=LARGE), "shards is 1000000000000"),
    "a width of a trillion": (
        manifest(d_a=LARGE, models__model_a__d_model=LARGE),
        "too small for the rows of 4000000000016 bytes",
    ),
    "a negative width": (
        manifest(d_a=-1, d_b=8, models__model_a__d_model=-1),
        "model_a is not -1 wide",
    ),
    "widths of its own": (manifest(d_a=4, d_b=3), "model_a is not 4 wide"),
    "a format that is none": (manifest(dtype="object"), "Invalid dtype"),
    "models that are none": (manifest(models=[]), "models is []"),
    "counts that are none": (manifest(counts={"pairs": "many"}), "pairs must be a valid integer"),
    "settings that are none": (manifest(data=None), "data is None"),
}


@pytest.mark.parametrize("what", CACHES)
def test_a_cache_that_claims_what_it_has_not_is_refused(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c").folder
    spoil, word = CACHES[what]
    spoil(folder)
    assert word in refused(lambda: PairedActivationsCache(folder))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (struct.pack("<Q", 2**60), "claims a header of"),
        (
            safetensors_with({"acts": claim([10**9, 7], [0, 28 * 10**9])}, bytes(896)),
            "not fully covered",
        ),
        (safetensors_with({"acts": claim([7, 32], [0, 896])}, bytes(896)), "does not hold the 32"),
        (safetensors_with({"rows": claim([32, 7], [0, 896])}, bytes(896)), "does not hold the 32"),
    ],
    ids=["header of 2^60 bytes", "28 GB in a kilobyte", "turned around", "of another name"],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_refused(
    content: bytes, word: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "c").folder
    content = content.ljust(900, b"\0") if len(content) < 900 else content
    (folder / SHARD).write_bytes(content)
    first_shard(size=len(content), xxh3=xxh3_128(content).hexdigest())(folder)
    assert word in refused(lambda: PairedActivationsCache(folder).shard(0))


# --- settings ---

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
NOT_YAML: dict[str, tuple[bytes, str]] = {
    "a billion laughs": (LAUGHS.encode(), "*a repeats a part by name"),
    "laughs by merging": (
        b"a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n",
        "*a repeats a part by name",
    ),
    "an object of Python": (
        b"lr: !!python/object/apply:os.system ['touch canary']\n",
        "could not determine a constructor",
    ),
    "nested deep": (b"[" * 40_000 + b"]" * 40_000, "recursion"),
    "maps nested deep": (b"{a: " * 10_000 + b"1" + b"}" * 10_000, "recursion"),
    "nested 500 deep": (b"[" * 500 + b"]" * 500, "recursion"),
    "a key twice": (b"lr: 1\nlr: 2\n", "'lr' appears twice"),
    "a key that is a list": (b"? [1, 2]\n: 3\n", "unhashable key"),
    "a key that is a number": (b"1: 2\n", "has 1 where it needs the name of a flag"),
    "a date that is none": (b"lr: 2020-13-45\n", "is not sound YAML: month"),
    "a number that is none": (b"lr: !!int ''\n", "is not sound YAML"),
    "a truth that is none": (b"lr: !!bool maybe\n", "is not sound YAML: 'maybe'"),
    "a time that is none": (b"lr: !!timestamp never\n", "is not sound YAML"),
    "a number of 50,000 digits": (b"lr: " + b"9" * 50_000 + b"\n", TOO_LONG),
    "a number of 50,000 digits to base 60": (
        b"lr: 1" + b":59" * 30_000 + b"\n",
        "more than 64 bits",
    ),
    "a file too large": (b"lr: 1\n#" + b"x" * 200_000, "no file of its kind has more"),
    "many small lists": (b"lr: [" + b"[]," * 30_000 + b"]\n", "more than 2,000 values"),
    "fewer small lists": (b"lr: [" + b"[]," * 1_900 + b"]\n", "where one value of lr"),
    "bytes": (b"lr: !!binary AAAA\n", "where one value of lr"),
    "no text": (bytes(range(128, 256)), "is not text"),
    "nothing": (b"", "must be a mapping"),
    "a list": (b"[1, 2]\n", "must be a mapping"),
    "lists in lists": (b"lr: [[1], [2]]\n", "has [1] where one value"),
    "flags among values": (
        b"reassign_at: ['--output-path=/evil']\n",
        "'--output-path=/evil' among the values",
    ),
    "no list of data sets": (b"sources: 5\n", "must be a list of data sets"),
    "a data set that is none": (b"sources: [5]\n", "A source must be a mapping"),
    "a data set of other types": (
        b"sources: [{dataset_path: [1]}]\n",
        "dataset_path must be a valid string",
    ),
    "a data set with more to say": (
        b"sources: [{dataset_path: a, trust_remote_code: true}]\n",
        "has a setting 'trust_remote_code'",
    ),
    "crosscoders that are none": (b"sae: [1, 2]\n", "must be a nonempty list of mappings"),
    "a recipe that is a list": (b"recipe: [dfc]\n", "recipe must be the name of a recipe"),
}
ONLY_BY_HAND: dict[str, tuple[bytes, str]] = {
    "code to run": (b"reference: /evil\n", "sets reference, a folder whose code is run"),
    "an address for the key": (b"judge-url: http://evil\n", "sets judge-url"),
    "the same in another spelling": (b"judge_url: http://evil\n", "sets judge_url"),
    "among a crosscoder's settings": (b"sae: [{judge_url: http://evil}]\n", "sets judge_url"),
}


@pytest.mark.first_is_fast
@pytest.mark.parametrize("what", [*NOT_YAML, *ONLY_BY_HAND])
def test_a_config_that_is_none_is_refused(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, word = {**NOT_YAML, **ONLY_BY_HAND}[what]
    (tmp_path / "c.yaml").write_bytes(content)
    assert word in refusal(capfd, "train", "--sae.d-sae", "64", "--config", "c.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.first_is_fast
@pytest.mark.parametrize("what", NOT_YAML)
def test_concerns_that_are_none_are_refused(what: str, tmp_path: Path) -> None:
    content, word = NOT_YAML[what]
    (tmp_path / "c.yaml").write_bytes(content)
    message = refused(lambda: read_concerns(tmp_path / "c.yaml"))
    # What is sound YAML, and no settings, is no concerns either.
    assert word in message or re.match("Concerns? .* must ", message)


@pytest.mark.parametrize("what", NOT_JSON)
def test_concerns_that_are_not_json_are_refused(what: str, tmp_path: Path) -> None:
    content, word = NOT_JSON[what]
    (tmp_path / "c.json").write_bytes(content)
    message = refused(lambda: read_concerns(tmp_path / "c.json"))
    assert (word if "object" not in word else "must map names to what they cover") in message


def test_a_device_is_not_read_to_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").symlink_to("/dev/zero")
    assert "is not a file" in refusal(capfd, "train", "--config", tmp_path / "c.yaml")


# --- data sets ---

CARDS_THAT_SAY_NOTHING = {
    "nothing",
    "flags among values",
    "crosscoders that are none",
    "a recipe that is a list",
}


def test_a_compressed_data_set_is_not_unpacked(tmp_path: Path) -> None:
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    (tmp_path / "bomb.jsonl").write_bytes(gzip.compress(line * 100_000))
    message = refused(lambda: open_rows(str(tmp_path / "bomb.jsonl")))
    assert "is compressed (gzip). Unpack it first" in message


def test_a_parquet_file_of_more_rows_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    column = pa.array(["a"]).dictionary_encode()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int32()), column.dictionary)
    parquet.write_table(pa.table({"text": rows}), tmp_path / "bomb.parquet")
    assert "it claims 1,000,000 rows" in refused(lambda: open_rows(str(tmp_path / "bomb.parquet")))


def zeros(n: int) -> Any:
    return pa.array([0] * n, pa.int32())


PARQUETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "texts of a megabyte in zstd": (
        lambda: pa.array(["a" * 10**6] * 200),
        {"compression": "zstd", "use_dictionary": False},
    ),
    "a megabyte as a word": (
        lambda: pa.DictionaryArray.from_arrays(zeros(100_000), ["a" * 10**6]),
        {"compression": "none", "store_schema": False},
    ),
    "a megabyte as a word in lists": (
        lambda: pa.ListArray.from_arrays(
            pa.array([0, 50_000, 100_000]),
            pa.DictionaryArray.from_arrays(zeros(100_000), ["a" * 10**6]),
        ),
        {"compression": "none", "store_schema": False},
    ),
    "ten million numbers in a row": (
        lambda: pa.ListArray.from_arrays(
            pa.array([0, 10**7]), pa.nulls(10**7, pa.int64()).fill_null(0)
        ),
        {"compression": "none"},
    ),
}


@pytest.mark.first_is_fast
@pytest.mark.parametrize("what", PARQUETS)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_parquet_file_that_is_small_and_stands_for_a_large_one_is_refused(
    what: str, in_folder: bool, tmp_path: Path
) -> None:
    make, how = PARQUETS[what]
    parquet.write_table(pa.table({"text": make()}), tmp_path / "train.parquet", **how)
    path = tmp_path if in_folder else tmp_path / "train.parquet"
    assert "unpacked. Save its text" in refused(lambda: open_rows(str(path)))


def test_text_that_repeats_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    words = random.Random(0).choices(["yes", "no", "it depends on what is asked"], k=30_000)
    parquet.write_table(pa.table({"text": words}), tmp_path / "d.parquet", compression="zstd")
    long = [f"{i} " * 500 for i in range(2_000)]
    parquet.write_table(pa.table({"text": long}), tmp_path / "e.parquet", compression="zstd")
    for name, texts in (("d.parquet", words), ("e.parquet", long)):
        assert list(load_texts(str(tmp_path / name))) == texts


@pytest.mark.parametrize("how", ["zstd", "lz4", "by number", "rows of nothing", "as a file"])
def test_a_saved_data_set_holds_no_more_than_its_bytes(how: str, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    [path] = (tmp_path / "d").glob("*.arrow")
    columns = {
        "by number": lambda: pa.DictionaryArray.from_arrays(zeros(100_000), ["a" * 10**6]),
        "rows of nothing": lambda: pa.nulls(10**9),
    }
    table = pa.table({"text": columns.get(how, lambda: pa.array(["a" * 10**6] * 200))()})
    options = pa.ipc.IpcWriteOptions(compression=how if how in ("zstd", "lz4") else None)
    new = pa.ipc.new_file if how == "as a file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, options=options) as writer:
        writer.write_table(table)
    del table
    said = {"by number": "unpacked", "rows of nothing": "claims", "as a file": "the file format"}
    message = refused(lambda: open_rows(str(tmp_path / "d")))
    assert said.get(how, "is compressed inside") in message


def test_a_folder_of_compressed_files_is_not_unpacked(tmp_path: Path) -> None:
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(line * 100_000))
    (tmp_path / "dataset_infos.json").write_text("{}")
    message = refused(lambda: open_rows(str(tmp_path)))
    assert "is compressed (gzip). Unpack it first" in message


@pytest.mark.parametrize("what", NOT_YAML)
def test_a_data_sets_card_that_is_none_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    open_rows(str(tmp_path))
    card = NOT_YAML[what][0].replace(b"sources: ", b"configs: ").replace(b"lr: ", b"configs: ")
    (tmp_path / "README.md").write_bytes(b"---\n" + card + b"\n---\n")
    if what in CARDS_THAT_SAY_NOTHING:
        open_rows(str(tmp_path))
    else:
        refused(lambda: open_rows(str(tmp_path)))


@pytest.mark.parametrize("transform", [5, "print", None])
def test_a_saved_data_set_brings_no_format(transform: Any, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    changed_json(
        tmp_path / "d" / "state.json",
        _format_type="custom",
        _format_kwargs={"transform": transform},
    )
    assert [row for row, _ in open_rows(str(tmp_path / "d")).read()] == [{"text": "a"}]


def test_a_row_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    days = pa.array([0, 2**40], pa.timestamp("s"))  # the year 36,812 is none for Python
    parquet.write_table(pa.table({"text": ["a", "b"], "day": days}), tmp_path / "d.parquet")
    rows = open_rows(str(tmp_path / "d.parquet"))
    assert "Could not read data set" in refused(lambda: list(rows.read()))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("d.jsonl", b"[" * 100_000, "Could not read data set"),
        ("d.jsonl", b'{"text":' * 100_000, "JSON parse error"),
        ("d.json", b"\xff\xfe", "JSON parse error"),
        ("d.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "Parquet file size is 112"),
        ("d.parquet", b"", "is empty. Give one with text in it"),
        ("d.txt", b"\xff", "is not text in UTF-8"),
    ],
)
def test_a_data_set_that_is_none_is_refused(
    name: str, content: bytes, word: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert word in refused(lambda: open_rows(str(tmp_path / name)))


# --- models ---


def gguf(n_tensors: int, n_values: int, content: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + content


KEY = struct.pack("<Q", 1) + b"k"


def tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return KEY + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GGUFS: dict[str, bytes] = {
    "2^60 tensors": gguf(2**60, 0),
    "2^60 values": gguf(0, 2**60),
    "a name of 2^60 bytes": gguf(0, 1, struct.pack("<Q", 2**60).ljust(32, b"a")),
    "a string of 2^60 bytes": gguf(0, 1, KEY + struct.pack("<IQ", 8, 2**60)),
    "2^60 numbers": gguf(0, 1, KEY + struct.pack("<IIQ", 9, 0, 2**60)),
    "2^60 strings": gguf(0, 1, KEY + struct.pack("<IIQ", 9, 8, 2**60)),
    "lists in lists": gguf(0, 1, KEY + struct.pack("<IIQ", 9, 9, 1) * 5),
    "2^31 dimensions": gguf(1, 0, KEY + struct.pack("<I", 2**31).ljust(64, b"\0")),
    "a tensor of 2^60 numbers": gguf(1, 0, tensor(2**60)),
    "a tensor of an unknown kind": gguf(1, 0, tensor(2**60, kind=999)),
    "a tensor of more numbers than there are": gguf(1, 0, tensor(2**63, 2**63, 2**63, 2**63)),
    "a tensor that ends beyond the end": gguf(1, 0, tensor(250_000, offset=8) + bytes(10**6)),
    "a thousand tensors in the same megabyte": gguf(1000, 0, tensor(250_000) * 1000 + bytes(10**6)),
    "a value of an unknown kind": gguf(0, 1, KEY + struct.pack("<IQ", 99, 0)),
    "another version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "half a header": b"GGUF\x03\x00\x00\x00",
    "nothing": b"",
    "something else": b"MZ" * 100,
}


@pytest.mark.parametrize("what", GGUFS)
def test_a_gguf_file_that_claims_what_it_has_not_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUFS[what])
    message = refused(lambda: load_model(ModelConfig(str(tmp_path / "m.gguf"))))
    assert ("is not a sound GGUF file" if GGUFS[what] else "m.gguf is empty") in message


def test_a_gguf_file_needs_the_package_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf(0, 0))
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    message = refused(lambda: load_model(ModelConfig(str(tmp_path / "m.gguf"))))
    assert "needs the package gguf. Install it: pip install" in message


def test_a_sound_gguf_file_is_let_through(tmp_path: Path) -> None:
    tensors = tensor(8, 4) + tensor(256, kind=12, offset=128)
    (tmp_path / "m.gguf").write_bytes(gguf(2, 0, tensors + bytes(128 + 144)))
    check_gguf(tmp_path / "m.gguf")


def test_a_chat_template_of_any_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b" " * 60_000_000)
    assert "no file of its kind" in refused(lambda: read_chat_template(str(tmp_path / "t.jinja")))


@pytest.mark.parametrize(
    ("claims", "word"),
    [
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "it claims 9,896,601,845,768 param"),
        ({"vocab_size": 2**40}, "it claims 35,184,372,095,864 parameters"),
        ({"num_hidden_layers": 10**9}, "it claims 1000000000 layers"),
        ({"num_hidden_layers": -1, "hidden_size": -16}, "negative dimension"),
        ({"hidden_size": "16"}, "'hidden_size'"),
        ({"num_attention_heads": 0}, "Could not load"),
    ],
    ids=str,
)
def test_a_model_that_claims_more_than_its_files_hold_is_refused(
    claims: dict[str, Any], word: str, llama_folder: Path, tmp_path: Path
) -> None:
    folder = copied(llama_folder, tmp_path / "m")
    changed_json(folder / "config.json", **claims)
    assert word in refused(lambda: load_model(ModelConfig(str(folder))))
