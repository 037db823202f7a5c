"""No name in a file leads out of its folder: nothing there is read, and nothing written or
removed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Audio, Dataset, Features, Image, List, Value
from datasets.table import InMemoryTable
from pyarrow import parquet
from xxhash import xxh3_128

from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.saved_run.held_out import run_config
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.core.atomic_write import atomic_file
from sae_lens_dfc.core.tensor_files import file_in
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.text.datasets import load_texts, open_rows
from sae_lens_dfc.training.checkpoint import check_files, checkpoints
from tests.data.cache.test_cache import write
from tests.reliability.hostile import changed_json, copied, refusal, refused

SECRET = "rows-00000-000000.safetensors"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A whole cache of somebody else's, beside the stranger's."""
    return write(tmp_path / "secret").folder / SECRET


NAMES: dict[str, Callable[[Path], str]] = {
    "a folder up": lambda secret: f"../secret/{secret.name}",
    "from the root": str,
    "roundabout": lambda secret: f"rows/../../secret/{secret.name}",
    "as on Windows": lambda secret: f"..\\secret\\{secret.name}",
    "nothing": lambda _: "",
    "the folder": lambda _: ".",
    "the folder above": lambda _: "..",
    "with a NUL": lambda secret: f"{secret.name}\0",
}


@pytest.mark.parametrize("how", NAMES)
def test_a_shard_lies_in_its_caches_folder(how: str, secret: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = NAMES[how](secret)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "leads elsewhere" in refused(lambda: PairedActivationsCache(folder))


def test_a_shard_is_no_link_to_elsewhere(secret: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache").folder
    (folder / SECRET).unlink()
    (folder / SECRET).symlink_to(secret)
    assert "leads elsewhere" in refused(lambda: PairedActivationsCache(folder))


def test_a_folder_that_is_a_link_itself_is_as_good_as_any(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache").folder
    (tmp_path / "link").symlink_to(folder)
    (folder / "other").symlink_to(folder / SECRET)
    assert len(PairedActivationsCache(tmp_path / "link").shard(0)["acts"]) == 32
    assert file_in(tmp_path / "link", "other").name == "other"


@pytest.mark.parametrize("how", NAMES)
def test_a_checkpoint_names_no_file_outside_it(
    how: str, run: Path, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = checkpoints(run.with_name("run-checkpoints"))
    folder = copied(last, tmp_path / last.name)
    changed_json(
        folder / "checksums.json",
        **{NAMES[how](secret): xxh3_128(secret.read_bytes()).hexdigest()},
    )
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: opened.append(self) or real(self, *a, **k)
    )
    assert "is a link, missing, or not part of it" in refused(lambda: check_files(folder))
    assert secret not in [path.resolve() for path in opened]


def test_a_checkpoint_has_no_link_and_no_file_that_was_not_written_with_it(
    run: Path, secret: Path, tmp_path: Path
) -> None:
    *_, last = checkpoints(run.with_name("run-checkpoints"))
    folder = copied(last, tmp_path / last.name)
    check_files(folder)
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "extra.safetensors").symlink_to(secret)
    assert "is a link" in refused(lambda: check_files(folder))
    (folder / "extra.safetensors").unlink()
    (folder / "extra.safetensors").write_bytes(b"x")
    assert "not part of it" in refused(lambda: check_files(folder))
    (folder / "extra.safetensors").unlink()
    changed_json(folder / "checksums.json", **{next(iter(sums)): 5})
    assert "is damaged" in refused(lambda: check_files(folder))


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/b", "..", ""])
def test_the_folders_of_several_crosscoders_are_not_named_by_a_file(
    name: str, run: Path, tmp_path: Path
) -> None:
    folder = copied(run, tmp_path / "run")
    values = json.loads((folder / "runner_cfg.json").read_text())
    other = {**values["sae"], "architecture": name}
    changed_json(folder / "runner_cfg.json", other_saes=[other])
    assert "is not registered" in refused(lambda: run_config(str(folder), HeldOutOptions()))
    named: dict[str, Any] = {**values["sae"], "name": name, "path": name}
    changed_json(folder / "runner_cfg.json", other_saes=[named])
    assert list(run_config(str(folder), HeldOutOptions()).saes) == ["0_dfc", "1_dfc"]


@pytest.mark.slow
def test_a_report_replaces_a_link_and_not_what_it_leads_to(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (folder / "report.html").symlink_to(mine)
    (folder / ".report.html.new").symlink_to(mine)
    assert main(["report", str(folder)]) == 0
    assert mine.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()
    assert "<html" in (folder / "report.html").read_text()


def test_what_is_replaced_is_not_written_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / ".file.new").symlink_to(mine)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("theirs")
    assert mine.read_text() == "mine" and (tmp_path / "file").read_text() == "theirs"


@pytest.mark.slow
def test_a_run_neither_writes_nor_removes_where_its_settings_say(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path / "run")
    mine = tmp_path / "mine"
    (mine / "2000").mkdir(parents=True)
    (mine / "2000" / "kept").write_text("mine")
    changed_json(
        folder / "runner_cfg.json",
        output_path=str(mine / "2000"),
        checkpoint_path=str(mine),
        overwrite=True,
        resume=True,
        n_checkpoints=3,
        cache_path=str(mine),
    )
    small = ["--downstream-pairs", "0", "--behavior-latents", "0", "--null-pairs", "700"]
    args = ["evaluate", str(folder), "--output", str(tmp_path / "out"), "--null", "shuffle", *small]
    assert main(args) == 0, capfd.readouterr().err
    assert [path.name for path in mine.rglob("*")] == ["2000", "kept"]
    assert (mine / "2000" / "kept").read_text() == "mine"


def test_another_number_of_latents_than_the_crosscoders_is_refused_before_any_is_made(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path / "run")
    changed_json(folder / "runner_cfg.json", sae__d_sae=10**12)
    assert "mixes two trainings" in refusal(capfd, "evaluate", folder)


# --- data sets ---


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of somebody's texts, beside one with a secret."""
    for name in ("secret", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return tmp_path / "theirs"


CARDS: dict[str, str] = {
    "a folder up": "data_files: ../secret/*.jsonl",
    "from the root": "data_files: ROOT/secret/*.jsonl",
    "roundabout": "data_files: [x/../../secret/train.jsonl]",
    "as a split": "data_files: [{split: train, path: ../secret/train.jsonl}]",
    "as an address": "data_files: file://ROOT/secret/train.jsonl",
    "as another address": "data_files: file:ROOT/secret/train.jsonl",
    "on the net": "data_files: http://127.0.0.1:1/train.jsonl",
    "in an archive": "data_files: zip://train.jsonl::ROOT/secret.zip",
    "a folder of data": "data_dir: ../secret",
    "a folder from the root": "data_dir: ROOT/secret",
    "a number": "data_files: 7",
    "a list in a list": "data_files: [[../secret/*.jsonl]]",
    "by another setting": "base_path: ../secret",
    "no configuration": "7",
}


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("what", CARDS)
def test_a_data_sets_card_names_no_file_outside_it(what: str, file: str, theirs: Path) -> None:
    line = CARDS[what].replace("ROOT", str(theirs.parent))
    card = f"configs: [{{config_name: default, {line}}}]\n" if line != "7" else "configs: [7]\n"
    (theirs / file).write_text(f"---\n{card}---\n" if file == "README.md" else card)
    message = refused(lambda: open_rows(str(theirs)))
    assert "its README.md" in message or "data_files" in message


@pytest.mark.parametrize(
    ("name", "leads_to"),
    [
        ("test.jsonl", "../secret/train.jsonl"),
        ("data", "../secret"),
        ("data", "."),
        ("test.jsonl", "/dev/zero"),
        ("README.md", "../secret/train.jsonl"),
    ],
)
def test_a_data_set_has_no_link_to_elsewhere(name: str, leads_to: str, theirs: Path) -> None:
    (theirs / name).symlink_to(leads_to)
    assert "is a link that leads elsewhere" in refused(lambda: open_rows(str(theirs)))


MEDIA = {"image": Image(), "list": List(Image()), "audio": Audio()}


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize("how", ["parquet", "saved", "folder"])
def test_what_a_row_names_as_its_picture_or_sound_is_neither_opened_nor_fetched(
    how: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_text("not to be opened")
    one = {"path": str(tmp_path / "secret.png"), "bytes": None}
    values = {"text": ["a", "b"], "shown": [[one] if kind == "list" else one] * 2}
    types = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        values,
        schema=pa.schema(
            {"text": pa.string(), "shown": pa.list_(types) if kind == "list" else types}
        ),
    )
    features = Features({"text": Value("string"), "shown": MEDIA[kind]})
    rows = Dataset(InMemoryTable(table.replace_schema_metadata(features.arrow_schema.metadata)))
    folder = tmp_path / "d"
    if how == "saved":
        rows.save_to_disk(folder)
    else:
        folder.mkdir()
        parquet.write_table(rows.data.table, folder / "train.parquet")
    path = str(folder / "train.parquet" if how == "parquet" else folder)
    assert list(load_texts(path)) == ["a", "b"]
    assert "no text column 'shown'" in refused(lambda: load_texts(path, "shown"))
