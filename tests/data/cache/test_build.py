"""From two models and a text to a cache, and from the cache to a crosscoder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_dfc import CrosscoderRunnerConfig, CrosscoderTrainingRunner, ModelConfig
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.activations import paired_activations
from sae_lens_dfc.data.cache.build import cache_activations
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.hooked_model import HookedModel
from tests.helpers import dfc_config

Output = Callable[[], tuple[str, str]]


@pytest.fixture
def cfg(tmp_path: Path, llama_config: ModelConfig, gpt2_config: ModelConfig) -> CacheConfig:
    text = tmp_path / "text.jsonl"
    pages = [page[:2000] for page in reference_pages()[:20]]
    text.write_text("\n".join(json.dumps({"text": page}) for page in pages))
    return CacheConfig(
        model_a=llama_config,
        model_b=gpt2_config,
        dataset_path=str(text),
        eval_every_n_documents=4,
        max_unique_pairs=3000,
        context_size=48,
        store_batch_size_prompts=4,
        cache_path=str(tmp_path / "cache"),
        cache_dtype="float32",
        shard_rows=300,
    )


def training(cfg: CacheConfig, **changes: Any) -> CrosscoderRunnerConfig:
    return CrosscoderRunnerConfig(
        sae=dfc_config(d_a=0, d_b=0, k=4),
        cache_path=cfg.cache_path,
        training_tokens=64 * 30,
        train_batch_size_tokens=64,
        lr=3e-3,
        **changes,
    )


def all_rows(cached: PairedActivationsCache) -> torch.Tensor:
    return torch.cat([cached.shard(i)["acts"] for i in range(len(cached.shards))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_cache_holds_the_rows_that_training_would_read(cfg: CacheConfig, pair: ModelPair) -> None:
    cached = cache_activations(cfg, pair)
    counts = PairCounts()
    live = torch.cat([rows.acts for rows in PairedText(cfg, pair).rows("training", counts)])
    assert torch.equal(all_rows(cached), live)
    assert len(cached) == counts.pairs == cached.manifest["counts"]["pairs"]
    assert {path.suffix for path in cached.folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.slow
def test_the_manifest_says_what_made_the_cache(cfg: CacheConfig, pair: ModelPair) -> None:
    manifest = cache_activations(cfg, pair).manifest
    for name, model in (("model_a", pair.a), ("model_b", pair.b)):
        assert manifest["models"][name].items() >= model.describe().items()
        assert manifest["models"][name]["dtype"] == "float32"
    assert manifest["data"]["dataset_path"] == cfg.dataset_path
    assert manifest["data"]["context_size"] == 48
    assert 0.3 < manifest["counts"]["coverage"]["coverage_a"] < 1
    assert manifest["places"][0]["sources"][0]["n_pairs"] == 3000
    assert manifest["norms"]["a"]["outlier_share"] < 0.2
    assert all(len(shard["xxh3"]) == 32 for shard in manifest["shards"])


@pytest.mark.slow
def test_origins_let_each_row_be_found_in_the_text(cfg: CacheConfig, pair: ModelPair) -> None:
    cached = cache_activations(replace(cfg, save_origins=True, outlier_factor=1e9), pair)
    columns = [cached.shard(i) for i in range(len(cached.shards))]
    found = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    assert set(found) == {
        "acts",
        "source",
        "document",
        "token_a",
        "token_b",
        "position_a",
        "position_b",
    }
    # A row's activation again, from nothing but its token ids and those of the rows before it.
    context = PairedText(cfg, pair).stream("training").batches(PairCounts())
    counts = PairCounts()
    (rows, *_) = paired_activations(pair, context, counts, 1e9)
    for i in range(len(rows.acts)):
        c = next(c for c in rows.contexts if c.number == rows.context[i])
        assert found["document"][i] == c.document
        ids_a = c.segments.ids_a[: int(found["position_a"][i]) + 1]
        assert found["token_a"][i] == ids_a[-1]


@pytest.mark.slow
def test_training_on_a_cache_opens_no_model_and_knows_what_made_it(
    cfg: CacheConfig, pair: ModelPair, tmp_path: Path
) -> None:
    cached = cache_activations(cfg, pair)
    run = training(cfg, output_path=str(tmp_path / "run"))
    crosscoder = CrosscoderTrainingRunner(run).run()
    assert crosscoder.cfg.metadata.model_a == pair.a.describe()
    assert crosscoder.cfg.metadata.pairs_trained == 64 * 30 < len(cached)
    # The run's own settings lead evaluation to the models and the held-out documents.
    saved = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    assert saved["model_a"]["model_name"] == cfg.model_a.model_name
    assert (saved["eval_every_n_documents"], saved["context_size"]) == (4, 48)
    assert main(["evaluate", str(tmp_path / "run"), "--eval-pairs", "200"]) == 0


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_a": ModelConfig("gpt2")}, "model_a.model_name='gpt2' is set.*'tiny-llama'"),
        ({"model_b": ModelConfig("", "blocks.1.hook_in")}, "model_b.hook_name='blocks.1.hook_in'"),
        ({"context_size": 96}, "context_size=96 is set.*was made with 48"),
        ({"dataset_path": "json"}, "dataset_path='json' is set"),
    ],
)
def test_a_cache_of_other_models_or_data_is_refused(
    change: dict[str, Any], message: str, cfg: CacheConfig, pair: ModelPair
) -> None:
    cache_activations(cfg, pair)
    with pytest.raises(ValueError, match=message):
        CrosscoderTrainingRunner(training(cfg, **change))


@pytest.mark.slow
def test_a_text_that_ends_early_is_said_and_the_cache_can_be_used(
    cfg: CacheConfig, pair: ModelPair
) -> None:
    with pytest.raises(
        ValueError, match="ended after .* of the 999999 pairs.*can be used as it is"
    ):
        cache_activations(replace(cfg, max_unique_pairs=999_999), pair)
    whole = PairedActivationsCache(cfg.cache_path)
    counts = PairCounts()
    list(PairedText(replace(cfg, max_unique_pairs=None), pair).rows("training", counts))
    assert len(whole) == counts.pairs > 3000


@pytest.mark.slow
def test_a_folder_that_holds_a_cache_or_anything_else_is_left_alone(
    cfg: CacheConfig, pair: ModelPair, tmp_path: Path
) -> None:
    before = contents(cache_activations(cfg, pair).folder)
    with pytest.raises(ValueError, match="already holds a cache. Pass --resume"):
        cache_activations(cfg, pair)
    with pytest.raises(ValueError, match="holds another cache: data.context_size was 48 and is 32"):
        cache_activations(replace(cfg, resume=True, context_size=32), pair)
    for left in (".manifest.json.new", "progress-00000.safetensors"):
        (Path(cfg.cache_path) / left).touch()  # by a kill at the very end
    cache_activations(replace(cfg, resume=True), pair)
    assert contents(Path(cfg.cache_path)) == before
    cache_activations(replace(cfg, overwrite=True, context_size=32), pair)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are not a cache"):
            # The folder that the cache's own is in: to overwrite it would remove the text too.
            cache_activations(replace(cfg, cache_path=str(tmp_path), overwrite=overwrite), pair)


def until(
    n_passes: int, monkeypatch: pytest.MonkeyPatch, cfg: CacheConfig, pair: ModelPair
) -> None:
    """Begin a cache, and have it stopped after so many forward passes."""
    made, done = HookedModel.activations, 0

    def counted(self: HookedModel, *args: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        if done > n_passes:
            raise KeyboardInterrupt
        return made(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HookedModel, "activations", counted)
        cache_activations(cfg, pair)


@pytest.mark.slow
def test_a_cache_goes_on_when_text_and_models_have_moved_and_not_with_others(
    cfg: CacheConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    whole = contents(cache_activations(cfg, pair).folder)
    cfg = replace(cfg, cache_path=cfg.cache_path + " again")
    until(12, monkeypatch, cfg, pair)
    lines = Path(cfg.dataset_path).read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[-1].replace("the", "tha", 1)]))
    with pytest.raises(ValueError, match="part of another cache: text.source_0.content was"):
        cache_activations(replace(cfg, dataset_path=str(other), resume=True), pair)
    moved = Path(cfg.dataset_path).rename(tmp_path / "moved.jsonl")
    shutil.copytree(cfg.model_a.model_name, tmp_path / "copy")
    model_a = replace(cfg.model_a, model_name=str(tmp_path / "copy"), device="cpu:0")
    here = replace(cfg, dataset_path=str(moved), model_a=model_a, n_writers=1, resume=True)
    cached = cache_activations(here)
    found = contents(cached.folder)
    assert {n: c for n, c in found.items() if n != "manifest.json"} == {
        n: c for n, c in whole.items() if n != "manifest.json"
    }
    assert cached.manifest["data"]["dataset_path"] == str(moved)
    assert "rounds differently" not in caplog.text
    # It is whole, and still the same when its text moves again.
    again = moved.rename(tmp_path / "again.jsonl")
    assert len(cache_activations(replace(here, dataset_path=str(again)))) == len(cached)


@pytest.mark.slow
def test_a_cache_that_goes_on_on_another_kind_of_device_says_so(
    cfg: CacheConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = replace(cfg, model_b=replace(cfg.model_b, device="cuda:2"))
    until(12, monkeypatch, gpu, pair)
    cache_activations(replace(cfg, resume=True), pair)
    messages = [record.getMessage() for record in caplog.records]
    [said] = [message for message in messages if "rounds differently" in message]
    assert "model_b.device was cuda:2 and is cpu" in said


@pytest.mark.slow
def test_a_training_on_a_cache_finds_its_text_where_it_is_now(
    cfg: CacheConfig, pair: ModelPair, tmp_path: Path
) -> None:
    cache_activations(cfg, pair)
    moved = Path(cfg.dataset_path).rename(tmp_path / "moved.jsonl")
    run = training(cfg, output_path=str(tmp_path / "run"))
    CrosscoderTrainingRunner(replace(run, dataset_path=str(moved))).run()
    # And so does what is measured of it later.
    assert main(["evaluate", str(tmp_path / "run"), "--eval-pairs", "200"]) == 0
    moved.write_text(moved.read_text().replace("the", "tha", 1))
    with pytest.raises(ValueError, match="dataset_path=.*moved.* is set, but the cache in"):
        CrosscoderTrainingRunner(training(cfg, dataset_path=str(moved)))


@pytest.mark.slow
@pytest.mark.parametrize("n_shards", [0, 1, 2])
def test_a_cache_stopped_before_its_first_files_can_be_resumed(
    n_shards: int, cfg: CacheConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(cache_activations(cfg, pair).folder)
    cfg = replace(cfg, cache_path=cfg.cache_path + " again")
    until(2 * n_shards * 3, monkeypatch, cfg, pair)
    cached = cache_activations(replace(cfg, resume=True), pair)
    assert contents(cached.folder) == whole


@pytest.mark.slow
def test_a_cache_stays_until_what_overwrites_it_is_known_to_fit(
    cfg: CacheConfig, pair: ModelPair
) -> None:
    before = contents(cache_activations(cfg, pair).folder)
    for change in ({"text_column": "body"}, {"context_size": 1000}):
        with pytest.raises(ValueError, match="no text column 'body'|is more than model"):
            cache_activations(replace(cfg, overwrite=True, **change), pair)
    assert contents(Path(cfg.cache_path)) == before


def test_a_folder_with_somebody_elses_manifest_is_left_alone(
    cfg: CacheConfig, pair: ModelPair
) -> None:
    folder = Path(cfg.cache_path)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    for name in ("manifest.json", "thesis.tex"):
        (folder / name).touch()
        with pytest.raises(ValueError, match=f"holds files that are not a cache: .*{name}"):
            cache_activations(replace(cfg, overwrite=True), pair)
    assert len(list(folder.iterdir())) == 2


def test_a_text_without_a_pair_is_an_error_not_an_empty_cache(
    cfg: CacheConfig, pair: ModelPair, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    cfg = replace(cfg, dataset_path=str(tmp_path / "empty.jsonl"), max_unique_pairs=None)
    with pytest.raises(ValueError, match="All 1 documents of .* are empty in column"):
        cache_activations(cfg, pair)


def test_a_cache_for_which_there_is_no_room_is_refused_before_it_is_begun(
    cfg: CacheConfig, pair: ModelPair
) -> None:
    with pytest.raises(ValueError, match="pairs take 160.*B, and .*B free"):
        cache_activations(replace(cfg, max_unique_pairs=10**15), pair)


@pytest.mark.slow
def test_another_folder_of_the_same_name_is_not_taken_for_the_cached_model(
    cfg: CacheConfig, pair: ModelPair, tmp_path: Path
) -> None:
    cache_activations(cfg, pair)
    other = tmp_path / Path(cfg.model_a.model_name).name
    other.mkdir()
    with pytest.raises(ValueError, match="model_a.model_name=.* is set"):
        CrosscoderTrainingRunner(training(cfg, model_a=ModelConfig(str(other))))
    with pytest.raises(ValueError, match="model_a.dtype='bfloat16' is set.*'float32'"):
        CrosscoderTrainingRunner(training(cfg, model_a=ModelConfig(dtype="bfloat16")))


def test_overwriting_and_resuming_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="overwrite and resume contradict each other"):
        CacheConfig(overwrite=True, resume=True)


# --- the command ---


def settings(cfg: CacheConfig) -> dict[str, Any]:
    """One file for both commands."""
    return {
        "model_a": {"model_name": cfg.model_a.model_name},
        "model_b": {"model_name": cfg.model_b.model_name},
        "sources": [
            {"dataset_path": cfg.dataset_path, "weight": 2},
            {"dataset_path": "cpython-docs"},
        ],
        "max_unique_pairs": 2400,
        "context_size": 48,
        "store_batch_size_prompts": 2,
        "cache_path": cfg.cache_path,
        "cache_dtype": "float32",
        "shard_rows": 200,
        "architecture": "batchtopk_crosscoder",
        "sae": {"d_sae": 64, "k": 4},
        "training_tokens": 1280,
        "train_batch_size_tokens": 64,
    }


def test_one_file_serves_cache_and_train(
    cfg: CacheConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(cfg)))
    assert main(["cache", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "rows of 16 + 24" in capsys.readouterr().out
    cached = PairedActivationsCache(cfg.cache_path)
    assert [s["weight"] for s in cached.manifest["data"]["sources"]] == [2, 1.0]
    a, b = (source["n_pairs"] for source in cached.manifest["places"][0]["sources"])
    assert a / b == pytest.approx(2, abs=0.1)
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    assert main([*arguments, "--output-path", str(tmp_path / "run")]) == 0
    metadata = json.loads((tmp_path / "run" / "cfg.json").read_text())["metadata"]
    assert metadata["pairs_trained"] == 1280


@pytest.mark.slow
def test_a_list_of_crosscoders_is_trained_on_one_stream(
    cfg: CacheConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = [
        {"architecture": "dfc", "d_sae": 64, "k": 4, "a_exclusive_fraction": 0.25},
        {"architecture": "dfc", "d_sae": 32, "k": 2},
        {"architecture": "standard_crosscoder", "d_sae": 64},
    ]
    values = {**settings(cfg), "sae": saes}
    # An entry's own architecture wins over the file's.
    assert values.pop("cache_path") and values["architecture"] == "batchtopk_crosscoder"
    values["reassign_at"] = [0.5]
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    assert main([*arguments, "--output-path", str(tmp_path / "runs"), "--lr", "1e-3"]) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders.pop() == "runner_cfg.json"
    assert folders == ["0_dfc", "1_dfc", "2_standard_crosscoder"]
    cfgs = [json.loads((tmp_path / "runs" / f / "cfg.json").read_text()) for f in folders]
    assert [(c["d_sae"], c["n_a_exclusive"]) for c in cfgs] == [(64, 16), (32, 1), (64, 0)]
    out = capsys.readouterr().out
    assert all(f"{tmp_path}/runs/{folder}" in out for folder in folders)
    runs = [str(tmp_path / "runs" / folder) for folder in folders[:1]]
    assert main(["evaluate", *runs, "--eval-pairs", "100"]) == 0


@pytest.mark.slow
def test_a_data_set_on_the_command_line_takes_the_place_of_a_files_sources(
    cfg: CacheConfig, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(cfg)))
    arguments = ["cache", "--config", str(tmp_path / "run.yaml"), "--max-unique-pairs", "500"]
    assert main([*arguments, "--dataset-path", cfg.dataset_path]) == 0
    data = PairedActivationsCache(cfg.cache_path).manifest["data"]
    assert (data["sources"], data["dataset_path"]) == ([], cfg.dataset_path)


def test_sources_and_a_data_set_in_one_file_are_refused(
    cfg: CacheConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({**settings(cfg), "dataset_path": "x.txt"}))
    assert main(["cache", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "has both sources and dataset_path" in capsys.readouterr().err


@pytest.mark.slow
def test_other_text_takes_the_place_of_all_sources(
    cfg: CacheConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**settings(cfg), "text_column": "text"}
    del values["cache_path"]
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output-path", run]) == 0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": "The cat sat on the mat. " * 9}))
    capsys.readouterr()
    assert main(["evaluate", run, "--dataset", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs_evaluated"] < 300


@pytest.mark.parametrize("source", [{"weight": 1}, {"dataset_path": "x", "wieght": 1}, "x"])
def test_a_source_that_is_no_source_is_one_clear_error(
    source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({"sources": [source]}))
    assert main(["cache", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "A source must be a mapping with dataset_path" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_cache_goes_on_to_the_same_files(cfg: CacheConfig, tmp_path: Path) -> None:
    values = {
        **settings(cfg),
        "max_unique_pairs": 20_000,
        "sources": [{"dataset_path": "cpython-docs"}],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "sae_lens_dfc", "cache", "--config", f"{tmp_path}/run.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--cache-path", str(whole)], check=True, env=env, **quiet)
    for n_shards in (3, 40):
        arguments = [*command, "--cache-path", str(killed), "--resume"]
        process = subprocess.Popen(arguments, env=env, **quiet)
        while process.poll() is None and len(list(killed.glob("rows-*"))) < n_shards:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "manifest.json").exists(), "it was to be killed before it was done"
    arguments = [*command, "--cache-path", str(killed), "--resume"]
    resumed = subprocess.run(arguments, check=False, env=env, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(killed) == contents(whole)
