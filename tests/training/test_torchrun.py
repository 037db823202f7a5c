"""Two processes under torchrun, as a user starts them: each reads its share, and what they make is
one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sae_lens_dfc import ModelConfig
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.contexts import PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.training.checkpoint import checkpoints

pytestmark = pytest.mark.slow
N_PAGES = 24


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, llama_config: ModelConfig, gpt2_config: ModelConfig
) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    pages = [page[:1500] for page in reference_pages()[:N_PAGES]]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
    settings = {
        "model_a": {"model_name": llama_config.model_name},
        "model_b": {"model_name": gpt2_config.model_name},
        "dataset_path": str(folder / "text.jsonl"),
        "eval_every_n_documents": 4,
        "context_size": 48,
        "store_batch_size_prompts": 2,
        "shard_rows": 200,
        "training_tokens": 64 * 300,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 8,
        "n_checkpoints": 20,
        "sae": {"d_sae": 64, "k": 4, "a_exclusive_fraction": 0.2},
        "reassign_at": [0.5],
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder


def start(folder: Path, *args: str) -> "subprocess.Popen[str]":
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *torchrun,
        "-m",
        "sae_lens_dfc",
        args[0],
        "--config",
        f"{folder}/run.yaml",
        *args[1:],
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *args: str) -> str:
    process = start(folder, *args)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, err[-3000:]
    return out


def kill(process: "subprocess.Popen[str]") -> None:
    """torchrun's processes first: they are no group of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*map(int, children), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def saved(run: Path) -> dict[str, bytes]:
    names = ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json")
    return {name: (run / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def cached(folder: Path) -> PairedActivationsCache:
    assert run(folder, "cache", "--cache-path", str(folder / "cache")).count("Cache: ") == 1
    return PairedActivationsCache(folder / "cache")


def test_each_process_writes_its_share_under_one_manifest(cached: PairedActivationsCache) -> None:
    by_rank = {shard.file.split("-")[1] for shard in cached.shards}
    assert by_rank == {"00000", "00001"}
    assert sum(shard.rows for shard in cached.shards) == len(cached)
    counts: dict[str, Any] = cached.manifest["counts"]
    assert counts["pairs"] == len(cached)
    # Twelve documents each, of which every fourth is held out.
    assert counts["texts"] == N_PAGES - 2 * 3
    assert sorted(path.suffix for path in cached.folder.iterdir())[0] == ".json"


def test_what_is_held_out_is_held_out_from_every_process(
    cached: PairedActivationsCache, pair: ModelPair
) -> None:
    data = cached.manifest["data"]
    names = ("dataset_path", "eval_every_n_documents", "context_size", "n_ranks")
    cfg = CacheConfig(**{name: data[name] for name in names})
    held_out = in_order(PairedText(cfg, pair).stream("held_out").batches(PairCounts()))
    trained = [
        in_order(PairedText(cfg, pair, rank).stream("training").batches(PairCounts()))
        for rank in (0, 1)
    ]
    read = [{tuple(context.segments.ids_a) for context in part} for part in (held_out, *trained)]
    assert all(read) and not read[0] & (read[1] | read[2]) and not read[1] & read[2]
    everything = CacheConfig(dataset_path=cfg.dataset_path, context_size=48)
    whole = in_order(PairedText(everything, pair).stream("all").batches(PairCounts()))
    assert set().union(*read) == {tuple(context.segments.ids_a) for context in whole}


def test_two_processes_train_on_the_cache_of_one_and_one_of_them_saves(
    folder: Path,
) -> None:
    assert (
        main(["cache", "--config", f"{folder}/run.yaml", "--cache-path", f"{folder}/of one"]) == 0
    )
    cached = PairedActivationsCache(folder / "of one")
    out = run(
        *(folder, "train", "--cache-path", str(cached.folder)),
        *("--output-path", str(folder / "from cache")),
    )
    assert out.count("Crosscoder: ") == 1
    metadata = json.loads((folder / "from cache" / "cfg.json").read_text())["metadata"]
    assert metadata["samples_trained"] == 64 * 300
    assert metadata["pairs_trained"] == len(cached)


def test_two_processes_that_are_killed_go_on_to_the_same_bits(folder: Path) -> None:
    run(folder, "train", "--output-path", str(folder / "whole"))
    process = start(folder, "train", "--output-path", str(folder / "killed"))
    seen: set[str] = set()
    while process.poll() is None and len(seen) < 5:
        seen |= {path.name for path in checkpoints(folder / "killed-checkpoints")}
        time.sleep(0.002)
    kill(process)
    assert not (folder / "killed").exists(), "they were to be killed before they were done"
    run(folder, "train", "--output-path", str(folder / "killed"), "--resume")
    assert saved(folder / "killed") == saved(folder / "whole")


def test_processes_asked_to_end_stop_at_one_step_and_go_on_to_the_same_bits(folder: Path) -> None:
    stopped = ("--output-path", str(folder / "stopped"))
    process = start(folder, "train", *stopped)
    while process.poll() is None and not checkpoints(folder / "stopped-checkpoints"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    last = checkpoints(folder / "stopped-checkpoints")[-1]
    assert f"stopped after {last.name} samples, saved in {last}" in err
    assert sorted(path.name for path in last.glob("rank-*")) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    run(folder, "train", *stopped, "--resume")
    run(folder, "train", "--output-path", str(folder / "never stopped"))
    assert saved(folder / "stopped") == saved(folder / "never stopped")
