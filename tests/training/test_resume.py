"""A training that is stopped and goes on ends bit by bit where one ends that never stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError

from sae_lens_dfc import (
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DFCTrainingCrosscoderConfig,
    StandardTrainingCrosscoderConfig,
    state,
)
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import reference_pages
from sae_lens_dfc.training.caching import CacheConfig, cache_activations
from sae_lens_dfc.training.checkpoint import checkpoints

STEPS = 40
TESTED = DFCTrainingCrosscoderConfig(
    d_sae=64,
    k=4,
    k_initial=8,
    k_anneal_steps=30,
    a_exclusive_fraction=0.2,
    b_exclusive_fraction=0.2,
    test_steps=[18, 35],
    test_window=10,
)
ON_THE_SPARSE_PATH = replace(TESTED, training_path="sparse")
COARSE = replace(ON_THE_SPARSE_PATH, encoder_product="bfloat16")
STANDARD = StandardTrainingCrosscoderConfig(d_sae=64, l1_warm_up_steps=30, aux_loss_coefficient=0.1)


def text(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"text": t}) for t in reference_pages()[:12]))
    return path


@pytest.fixture
def cfg(
    tmp_path: Path, llama_config: ModelConfig, gpt2_config: ModelConfig
) -> CrosscoderRunnerConfig:
    return CrosscoderRunnerConfig(
        sae=TESTED,
        model_a=llama_config,
        model_b=gpt2_config,
        dataset_path=str(text(tmp_path / "text.jsonl")),
        held_out_every=4,
        context_size=48,
        training_tokens=64 * STEPS,
        train_batch_size_tokens=64,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=4,
        lr=3e-3,
        lr_warm_up_steps=5,
        lr_decay_steps=8,
        dead_feature_window=6,
        feature_sampling_window=15,
        output_path=str(tmp_path / "run"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=6,
    )


class KilledError(Exception):
    """Stands in for a kill."""


def stop_at(
    step: int, cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin a training, or go on with it, and have it die before this step."""
    made = SAETrainer.step

    def step_or_die(self: Any, batch: torch.Tensor) -> Any:
        if self.n_training_steps == step:
            raise KilledError
        return made(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(SAETrainer, "step", step_or_die)
        CrosscoderTrainingRunner(cfg, pair).run_all()


def saved(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("cfg.json")]
    assert len(files) >= 3
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def uninterrupted(cfg: CrosscoderRunnerConfig, pair: ModelPair) -> dict[str, bytes]:
    folder = Path(cfg.output_path or "") / ".." / "never stopped"
    here = replace(cfg, output_path=str(folder.resolve()), checkpoint_path=None, n_checkpoints=0)
    CrosscoderTrainingRunner(here, pair).run_all()
    return saved(folder)


def stopped_and_resumed(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch, *steps: int
) -> dict[str, bytes]:
    for i, step in enumerate(steps):
        stop_at(step, replace(cfg, resume=i > 0), pair, monkeypatch)
    CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run_all()
    assert cfg.output_path is not None
    return saved(Path(cfg.output_path))


@pytest.mark.parametrize(
    "sae",
    [TESTED, ON_THE_SPARSE_PATH, COARSE, STANDARD],
    ids=["dfc", "dfc, sparse", "dfc, bfloat16", "standard"],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_training_stopped_twice_ends_with_the_same_bits(
    sae: CrosscoderTrainingConfig,
    prefetch: int,
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Step 15 is amid the evidence of the first test, step 30 amid that of the second.
    cfg = replace(cfg, sae=sae, prefetch_llm_batches=prefetch)
    resumed = stopped_and_resumed(cfg, pair, monkeypatch, 15, 30)
    assert resumed == uninterrupted(cfg, pair)


def test_a_training_in_memory_resumes_too(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(cfg, keep_in_memory=True, training_pairs=900)
    assert stopped_and_resumed(cfg, pair, monkeypatch, 29) == uninterrupted(cfg, pair)


def test_several_crosscoders_resume_together(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(cfg, other_saes=[STANDARD, TESTED, ON_THE_SPARSE_PATH, COARSE])
    resumed = stopped_and_resumed(cfg, pair, monkeypatch, 22)
    assert resumed == uninterrupted(cfg, pair)
    weights = {name: w for name, w in resumed.items() if name.endswith("sae_weights.safetensors")}
    assert len(set(weights.values())) == 5, "the same settings twice are two seeds"


def test_a_training_on_a_cache_resumes(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {name: getattr(cfg, name) for name in ("dataset_path", "held_out_every", "context_size")}
    cache_activations(CacheConfig(**data, cache_path=str(tmp_path / "cache"), shard_rows=200), pair)
    cfg = replace(cfg, cache_path=str(tmp_path / "cache"), cache_window_shards=3)
    # No models: were they opened, there would be an error.
    cfg = replace(cfg, model_a=ModelConfig(), model_b=ModelConfig())
    assert stopped_and_resumed(cfg, pair, monkeypatch, 29) == uninterrupted(cfg, pair)


def test_without_a_checkpoint_training_starts_at_its_beginning(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sae_lens_dfc"):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    assert "training starts at its beginning" in caplog.text
    assert cfg.output_path is not None
    assert saved(Path(cfg.output_path)) == uninterrupted(cfg, pair)


def test_the_last_two_checkpoints_are_kept_and_nothing_in_them_is_pickled(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    CrosscoderTrainingRunner(cfg, pair).run()
    assert cfg.checkpoint_path is not None
    folder = Path(cfg.checkpoint_path)
    kept = [path.name for path in checkpoints(folder)]
    assert len(kept) == 2 and int(kept[1]) > 64 * STEPS * 0.8
    assert {path.name for path in folder.iterdir()} == set(kept)
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, "cfg.lr was 0.003 and is 0.001"),
        ({"sae": replace(TESTED, k=5)}, "cfg.sae.k was 4"),
        ({"seed": 7}, "cfg.seed was 42 and is 7"),
        ({"held_out_every": 5}, "cfg.held_out_every was 4 and is 5"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused(
    change: dict[str, Any],
    named: str,
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    with pytest.raises(ValueError, match=f"is of another training: {named}"):
        CrosscoderTrainingRunner(replace(cfg, resume=True, **change), pair).run()


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(30, cfg, pair, monkeypatch)
    assert cfg.checkpoint_path is not None and cfg.output_path is not None
    *_, last = checkpoints(Path(cfg.checkpoint_path))
    state = next(last.glob("rank-*.safetensors"))
    content = bytearray(state.read_bytes())
    for damage in (content[:-100], [*content[:-1], content[-1] ^ 1]):
        state.write_bytes(bytes(damage))
        with pytest.raises(ValueError, match="is damaged: rank-00000.*Remove its folder to resume"):
            CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    for file in sorted(last.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    last.rmdir()
    CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    assert saved(Path(cfg.output_path)) == uninterrupted(cfg, pair)


def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    CrosscoderTrainingRunner(replace(cfg, output_path=None), pair).run()
    with pytest.raises(ValueError, match="Pass --resume to go on with it, --overwrite to begin"):
        CrosscoderTrainingRunner(cfg, pair)


def test_a_text_that_changed_is_not_gone_on_with(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    path = Path(cfg.dataset_path)
    path.write_text(path.read_text() + '\n{"text": "more"}')
    with pytest.raises(ValueError, match="is of another training: text was"):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()


def test_a_model_that_changed_is_not_gone_on_with(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    monkeypatch.setattr(pair.a, "_weights_sha256", "another", raising=False)
    with pytest.raises(ValueError, match="is of another training: models.model_a.weights_sha256"):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()


def test_resuming_what_is_finished_says_so_and_another_run_there_is_left_alone(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cfg.output_path is not None
    CrosscoderTrainingRunner(cfg, pair).run()
    before = saved(Path(cfg.output_path))
    assert CrosscoderTrainingRunner(replace(cfg, resume=True), pair).is_finished
    other = replace(cfg, lr=1e-3)
    with pytest.raises(ValueError, match="holds another run: lr was 0.003 and is 0.001"):
        CrosscoderTrainingRunner(replace(other, resume=True), pair)
    assert saved(Path(cfg.output_path)) == before
    # A run that is being replaced, killed on the way: the old one is still there, and is not taken for it.
    other = replace(other, overwrite=True)
    assert stopped_and_resumed(other, pair, monkeypatch, 20) == uninterrupted(
        replace(other, overwrite=False), pair
    )


def test_a_full_disk_at_a_checkpoint_is_one_clear_error_and_keeps_the_one_before(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, n_saved = state.save_file, 0

    def until_full(*args: Any, **kwargs: Any) -> None:
        nonlocal n_saved
        n_saved += 1
        if n_saved > 4:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        made(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", until_full)
        with pytest.raises(OSError, match="Could not write checkpoint.*No space left.*--resume"):
            CrosscoderTrainingRunner(cfg, pair).run()
    assert cfg.checkpoint_path is not None and cfg.output_path is not None
    assert [path.name.isdigit() for path in Path(cfg.checkpoint_path).iterdir()] == [True, True]
    CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    assert saved(Path(cfg.output_path)) == uninterrupted(cfg, pair)


# --- a real kill ---


@pytest.fixture
def command(
    tmp_path: Path, llama_config: ModelConfig, gpt2_config: ModelConfig
) -> Iterator[list[str]]:
    settings = {
        "model_a": {"model_name": llama_config.model_name},
        "model_b": {"model_name": gpt2_config.model_name},
        "dataset_path": str(text(tmp_path / "text.jsonl")),
        "held_out_every": 4,
        "context_size": 48,
        "training_tokens": 64 * 400,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 8,
        "n_checkpoints": 30,
        "sae": {"d_sae": 256, "k": 4, "a_exclusive_fraction": 0.1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    yield [sys.executable, "-m", "sae_lens_dfc", "train", "--config", str(tmp_path / "run.yaml")]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(command: list[str], tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output-path", str(whole)], check=True, env=env, **quiet)
    arguments = [*command, "--output-path", str(killed)]
    for n_seen in (2, 12):
        process = subprocess.Popen([*arguments, "--resume"], env=env, **quiet)
        seen: set[str] = set()
        while process.poll() is None and len(seen) < n_seen:
            seen |= {path.name for path in checkpoints(tmp_path / "killed-checkpoints")}
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not killed.exists(), "it was to be killed before it was done"
    result = subprocess.run(
        [*arguments, "--resume"], check=True, env=env, capture_output=True, text=True
    )
    assert "Training goes on from" in result.stderr
    assert saved(killed) == saved(whole)


def test_a_checkpoint_stays_until_the_next_of_its_step_is_whole_and_halves_are_tidied_up(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    folder, made = Path(cfg.checkpoint_path or ""), CrosscoderTrainingRunner._evaluator
    before = checkpoints(folder)
    resumed = replace(cfg, resume=True)

    def asked_to_end(runner: CrosscoderTrainingRunner) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return made(runner)

    def on_a_full_disk(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        # It writes the checkpoint anew that it has begun with.
        patch.setattr(CrosscoderTrainingRunner, "_evaluator", asked_to_end)
        patch.setattr(state, "save_file", on_a_full_disk)
        with pytest.raises(OSError, match="Could not write checkpoint"):
            CrosscoderTrainingRunner(resumed, pair).run()
    assert checkpoints(folder) == before
    # Killed between the two renames, and before the checksums were written.
    before[-1].rename(folder / f".{before[-1].name}.old.new")
    (folder / ".77.new").mkdir()
    assert stopped_and_resumed(resumed, pair, monkeypatch) == uninterrupted(cfg, pair)
    assert not [path for path in folder.glob(".*") if path.name.endswith(".new")]
