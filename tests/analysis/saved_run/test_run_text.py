"""A data set that holds a run's own rows is read as the run's text, wherever it lies."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sae_lens_dfc.analysis.evaluation.evaluate_run import case_of
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.saved_run.held_out import (
    held_out_text,
    is_own_text,
    opened_run,
    own_config,
)
from sae_lens_dfc.analysis.saved_run.run_text import own_source, text_signs, with_sources
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from tests.helpers import dfc_config, train_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run_text")
    return train_tiny(folder, llama_folder, gpt2_folder, "--training-tokens", "640")


@pytest.fixture(scope="module")
def moved(run: Path) -> Path:
    """The run's rows under another name, in another format, with another column beside."""
    rows = [json.loads(line) for line in (run.parent / "text.jsonl").read_text().splitlines()]
    path = run.parent / "elsewhere.parquet"
    Dataset.from_list([{**row, "n": i} for i, row in enumerate(rows)]).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def other(run: Path) -> Path:
    """As many rows, one of them changed."""
    first, *lines = (run.parent / "text.jsonl").read_text().splitlines()
    path = run.parent / "other.jsonl"
    changed = json.dumps({"text": json.loads(first)["text"] + "!"})
    path.write_text("\n".join([changed, *lines]))
    return path


def measures(capsys: pytest.CaptureFixture[str], run: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--eval-pairs", "1000000", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_moved_text_gives_the_measures_of_the_part_that_was_held_out(
    run: Path, moved: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = measures(capsys, run)
    caplog.clear()
    with caplog.at_level(logging.INFO, "sae_lens_dfc"):
        assert measures(capsys, run, "--dataset", str(moved)) == own
    said = [line for line in caplog.messages if "only its held-out part is read" in line]
    assert len(said) == 1 and str(moved) in said[0] and "every 4th document" in said[0]


@pytest.mark.slow
def test_other_text_is_read_whole(run: Path, other: Path) -> None:
    options = HeldOutOptions(dataset=str(other), eval_pairs=500)
    text, part = held_out_text(str(run), options, opened_run(str(run), options)[2])
    assert (part, text.cfg.dataset_path) == ("all", str(other))
    assert not is_own_text(str(run), options)


@pytest.mark.slow
def test_training_rows_are_read_where_the_text_is_now(run: Path, moved: Path) -> None:
    options = HeldOutOptions(dataset=str(moved), eval_pairs=500)
    own = own_config(str(run), options, 300)
    assert (own.dataset_path, own.max_unique_pairs) == (str(moved), 300)
    case = case_of(str(run), options, own, opened_run(str(run), options)[2])
    assert sum(len(rows.acts) for rows in case.data.training) <= 300
    assert is_own_text(str(run), options)


@pytest.mark.slow
def test_a_run_that_stores_no_fingerprints_says_so(
    run: Path, moved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = shutil.copytree(run, tmp_path / "old")
    values = json.loads((old / "cfg.json").read_text())
    del values["metadata"]["made_of"]
    (old / "cfg.json").write_text(json.dumps(values))
    assert text_signs(str(old)) == {} != text_signs(str(run))
    assert main(["evaluate", str(old), "--dataset", str(moved), "--eval-pairs", "300"]) == 0
    assert "has no fingerprints of its training rows" in caplog.text


@pytest.mark.slow
def test_a_run_of_a_cache_knows_the_text_that_the_cache_was_made_of(
    run: Path, moved: Path, llama_folder: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    models = [f"--model-a.model-name={llama_folder}", f"--model-b.model-name={gpt2_folder}"]
    text = ["--dataset-path", str(run.parent / "text.jsonl"), "--context-size", "48"]
    args = [*models, *text, "--max-unique-pairs", "400", "--cache-path", str(cache)]
    assert main(["cache", *args]) == 0
    sae = ["--sae.d-sae", "64", "--sae.k", "2", "--training-tokens", "256"]
    sizes = ["--train-batch-size-tokens", "64", "--output-path", str(tmp_path / "run")]
    assert main(["train", "--cache-path", str(cache), *sae, *sizes]) == 0
    assert is_own_text(str(tmp_path / "run"), HeldOutOptions(dataset=str(moved)))


def write_rows(path: Path, n: int) -> str:
    path.write_text("\n".join(json.dumps({"body": f"row {i} of {n}"}) for i in range(n)))
    return str(path)


def test_one_of_several_data_sets_is_found_with_its_settings(tmp_path: Path) -> None:
    sources = [
        SourceConfig(write_rows(tmp_path / f"{n}.jsonl", n), weight=n, text_column="body")
        for n in (3, 5)
    ]
    cfg = CrosscoderRunnerConfig(sae=dfc_config(), sources=sources)
    signs = {f"source_{i}": Source.open(one).fingerprint for i, one in enumerate(sources)}
    found = own_source(signs, cfg, write_rows(tmp_path / "moved.jsonl", 5))
    assert found is not None and found.number == 1
    assert (found.source.weight, found.source.text_column) == (5, "body")
    assert with_sources(cfg, [found.source]).all_sources == [found.source]
    assert own_source(signs, cfg, write_rows(tmp_path / "more.jsonl", 6)) is None
    assert own_source(signs, cfg, str(tmp_path / "nowhere.jsonl")) is None
