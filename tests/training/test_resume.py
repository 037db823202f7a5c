"""A training that is stopped and goes on ends bit by bit where one ends that never stopped."""

import json
import logging
import os
import shutil
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
from transformers import AutoModelForCausalLM

from sae_lens_dfc import (
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DFCTrainingCrosscoderConfig,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.core import tensor_files
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.cache.build import cache_activations
from sae_lens_dfc.data.config import CacheConfig, SourceConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.checkpoint import checkpoints, load_place
from tests.helpers import write_pages

STEPS = 40
WEIGHTS = "sae_weights.safetensors"
TESTED = DFCTrainingCrosscoderConfig(
    d_sae=64,
    k=4,
    k_initial=8,
    k_anneal_steps=30,
    a_exclusive_fraction=0.2,
    b_exclusive_fraction=0.2,
    reassign_steps=[18, 35],
    evidence_window=10,
)
ON_THE_SPARSE_PATH = replace(TESTED, training_path="sparse")
COARSE = replace(ON_THE_SPARSE_PATH, encoder_product="bfloat16")
STANDARD = StandardTrainingCrosscoderConfig(d_sae=64, l1_warm_up_steps=30, aux_loss_coefficient=0.1)


def text(path: Path) -> Path:
    write_pages(path, 12)
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
        eval_every_n_documents=4,
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
    [
        ON_THE_SPARSE_PATH,
        pytest.param(TESTED, marks=pytest.mark.slow),
        pytest.param(COARSE, marks=pytest.mark.slow),
        pytest.param(STANDARD, marks=pytest.mark.slow),
    ],
    ids=["dfc, sparse", "dfc", "dfc, bfloat16", "standard"],
)
@pytest.mark.parametrize("prefetch", [pytest.param(0, marks=pytest.mark.slow), 2])
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


@pytest.mark.slow
def test_a_training_in_memory_resumes_too(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(cfg, keep_in_memory=True, max_unique_pairs=900)
    assert stopped_and_resumed(cfg, pair, monkeypatch, 29) == uninterrupted(cfg, pair)


@pytest.mark.slow
def test_several_crosscoders_resume_together(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(cfg, other_saes=[STANDARD, TESTED, ON_THE_SPARSE_PATH, COARSE])
    resumed = stopped_and_resumed(cfg, pair, monkeypatch, 22)
    assert resumed == uninterrupted(cfg, pair)
    weights = {name: w for name, w in resumed.items() if name.endswith("sae_weights.safetensors")}
    assert len(set(weights.values())) == 5, "the same settings twice are two seeds"


@pytest.mark.slow
def test_a_training_on_a_cache_resumes(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {
        name: getattr(cfg, name)
        for name in ("dataset_path", "eval_every_n_documents", "context_size")
    }
    cache_activations(CacheConfig(**data, cache_path=str(tmp_path / "cache"), shard_rows=200), pair)
    cfg = replace(cfg, cache_path=str(tmp_path / "cache"), cache_window_shards=3)
    # No models: were they opened, there would be an error.
    cfg = replace(cfg, model_a=ModelConfig(), model_b=ModelConfig())
    assert stopped_and_resumed(cfg, pair, monkeypatch, 29) == uninterrupted(cfg, pair)


@pytest.mark.slow
def test_without_a_checkpoint_training_starts_at_its_beginning(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sae_lens_dfc"):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    assert "training starts from the beginning" in caplog.text
    assert cfg.output_path is not None
    assert saved(Path(cfg.output_path)) == uninterrupted(cfg, pair)


@pytest.mark.slow
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


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, "lr was 0.003 and is 0.001"),
        ({"sae": replace(TESTED, k=5)}, "sae.k was 4"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"eval_every_n_documents": 5}, "eval_every_n_documents was 4 and is 5"),
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
    with pytest.raises(ValueError, match=f"belongs to another training: {named}"):
        CrosscoderTrainingRunner(replace(cfg, resume=True, **change), pair).run()


@pytest.mark.slow
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


@pytest.mark.slow
def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    CrosscoderTrainingRunner(replace(cfg, output_path=None), pair).run()
    with pytest.raises(ValueError, match="Pass --resume to continue it, --overwrite to start"):
        CrosscoderTrainingRunner(cfg, pair)


@pytest.mark.slow
def test_a_text_that_changed_is_not_gone_on_with(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    path = Path(cfg.dataset_path)
    path.write_text(path.read_text() + '\n{"text": "more"}')
    with pytest.raises(ValueError, match="another training: text.source_0.rows was 12 and is 13"):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()


# --- what has moved ---


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def copied(model: ModelConfig, folder: Path) -> ModelConfig:
    """The same model in a folder of another name."""
    shutil.copytree(model.model_name, folder)
    return replace(model, model_name=str(folder))


@pytest.mark.slow
def test_data_and_models_that_were_moved_and_another_device_are_gone_on_with_to_the_same_bits(
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(cfg.dataset_path).rename(tmp_path / "elsewhere" / "pages.jsonl")
    here = replace(
        cfg,
        dataset_path=str(moved),
        text_column="text",
        model_a=replace(copied(cfg.model_a, tmp_path / "copy a"), device="cpu:0"),
        model_b=copied(cfg.model_b, tmp_path / "copy b"),
        sae=replace(TESTED, device="cpu:0"),
        device="cpu:0",
        resume=True,
    )
    CrosscoderTrainingRunner(here).run()
    assert "rounds differently" not in caplog.text
    whole: dict[str, Any] = {"output_path": str(tmp_path / "whole"), "resume": False}
    CrosscoderTrainingRunner(replace(here, **whole, checkpoint_path=None, n_checkpoints=0)).run()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    # It has ended, and is found to be the same again wherever its text is.
    again = moved.rename(tmp_path / "again.jsonl")
    assert CrosscoderTrainingRunner(replace(here, dataset_path=str(again))).is_finished


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: [*rows[:-1], rows[-1].replace("the", "The", 1)], "content was"),
        (lambda rows: rows[:-1], "rows was 12 and is 11"),
        (lambda rows: rows[::-1], "content was"),
    ],
)
def test_other_rows_at_another_place_are_not_gone_on_with(
    change: Any,
    named: str,
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(change(Path(cfg.dataset_path).read_text().splitlines())))
    with pytest.raises(ValueError, match=f"belongs to another training: text.source_0.{named}"):
        CrosscoderTrainingRunner(replace(cfg, dataset_path=str(other), resume=True), pair).run()


@pytest.mark.slow
def test_a_streamed_folder_that_was_moved_is_gone_on_with_and_another_is_not(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = Path(cfg.dataset_path).read_text().splitlines()
    for i, part in enumerate((lines[:5], lines[5:])):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{i}.jsonl").write_text("\n".join(part) + "\n")
    cfg = replace(cfg, dataset_path=str(tmp_path / "parts"))
    stop_at(25, cfg, pair, monkeypatch)
    other = Path(shutil.copytree(tmp_path / "parts", tmp_path / "other"))
    (other / "1.jsonl").write_text((other / "1.jsonl").read_text().replace("the", "tha", 1))
    resumed = replace(cfg, resume=True)
    with pytest.raises(ValueError, match="belongs to another training: text.source_0.content was"):
        CrosscoderTrainingRunner(replace(resumed, dataset_path=str(other)), pair).run()
    moved = Path(cfg.dataset_path).rename(tmp_path / "moved")
    here = replace(cfg, dataset_path=str(moved))
    CrosscoderTrainingRunner(replace(here, resume=True), pair).run()
    assert weights(tmp_path / "run") == uninterrupted(here, pair)[WEIGHTS]


@pytest.mark.slow
def test_what_is_given_up_for_and_one_source_in_a_list_change_nothing(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    sources = [SourceConfig(cfg.dataset_path, max_unreadable=0.5)]
    resumed = replace(cfg, sources=sources, dataset_path="gone.jsonl", eval_pairs=7, resume=True)
    CrosscoderTrainingRunner(resumed, pair).run()
    assert weights(Path(cfg.output_path or "")) == uninterrupted(cfg, pair)[WEIGHTS]


@pytest.mark.slow
def test_another_kind_of_device_is_gone_on_with_and_said(
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    made = load_place

    def of_a_gpu(folder: Path) -> Any:
        place, values = made(folder)
        values["cfg"]["device"] = values["cfg"]["model_b"]["device"] = "cuda:3"
        return place, values

    monkeypatch.setattr("sae_lens_dfc.training.runner.load_place", of_a_gpu)
    CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()
    messages = [record.getMessage() for record in caplog.records]
    [said] = [message for message in messages if "rounds differently" in message]
    assert "device was cuda:3 and is cpu, model_b.device was cuda:3 and is cpu" in said


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [True, False])
def test_another_chat_template_is_another_training_if_the_text_is_chats(
    is_chat: bool, cfg: CrosscoderRunnerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(cfg.dataset_path)
    pages = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": page[:2000]}]} for page in pages]
    if is_chat:
        path.write_text("\n".join(json.dumps(chat) for chat in chats))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    models = [replace(m, chat_template=str(template)) for m in (cfg.model_a, cfg.model_b)]
    cfg = replace(cfg, model_a=models[0], model_b=models[1])
    stop_at(8, cfg, ModelPair.load(*models), monkeypatch)
    moved = template.rename(tmp_path / "moved.jinja")
    resumed = replace(cfg, model_a=replace(models[0], chat_template=str(moved)), resume=True)
    resumed = replace(resumed, model_b=replace(models[1], chat_template=str(moved)))
    stop_at(16, resumed, ModelPair.load(resumed.model_a, resumed.model_b), monkeypatch)
    moved.write_text("{% for m in messages %}{{ m.role }} - {{ m.content }}{% endfor %}")
    changed = ModelPair.load(resumed.model_a, resumed.model_b)
    if not is_chat:
        CrosscoderTrainingRunner(resumed, changed).run()
        return
    with pytest.raises(ValueError, match="belongs to another training: text.chat_template_a was"):
        CrosscoderTrainingRunner(resumed, changed).run()


@pytest.mark.slow
def test_a_finished_run_of_other_text_or_models_is_not_taken_for_this_one(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, tmp_path: Path
) -> None:
    CrosscoderTrainingRunner(cfg, pair).run()
    resumed = replace(cfg, resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(cfg.dataset_path).read_text() + '\n{"text": "more"}')
    with pytest.raises(ValueError, match="holds another run: text.source_0.rows was 12 and is 13"):
        CrosscoderTrainingRunner(replace(resumed, dataset_path=str(other)), pair)
    swapped = replace(resumed, model_a=cfg.model_b, model_b=cfg.model_a)
    with pytest.raises(ValueError, match="holds another run: sae.d_a was 16 and is 24"):
        CrosscoderTrainingRunner(swapped, ModelPair(pair.b, pair.a))
    retrained = AutoModelForCausalLM.from_pretrained(cfg.model_a.model_name)
    retrained.lm_head.weight.data += 0.1
    model_a = copied(cfg.model_a, tmp_path / "retrained")
    retrained.save_pretrained(model_a.model_name)
    with pytest.raises(ValueError, match="holds another run: models.model_a.weights_sha256 was"):
        CrosscoderTrainingRunner(replace(resumed, model_a=model_a))


@pytest.mark.slow
def test_a_finished_run_of_a_device_that_is_not_here_is_found_to_be_finished(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    CrosscoderTrainingRunner(cfg, pair).run()
    path = Path(cfg.output_path or "") / "runner_cfg.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:63"'))
    assert CrosscoderTrainingRunner(replace(cfg, resume=True), pair).is_finished


@pytest.mark.slow
def test_the_command_goes_on_with_moved_data_on_a_device_of_another_name(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [*command[3:], "--training-tokens", "1280", "--output-path", str(tmp_path / "run")]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "run")
    moved = (tmp_path / "text.jsonl").rename(tmp_path / "moved.jsonl")
    arguments += ["--dataset-path", str(moved), "--device", "cpu:0", "--resume"]
    assert main(arguments) == 0
    assert "Resuming training from" in caplog.text
    moved.write_text(moved.read_text().replace("the", "tha", 1))
    shutil.rmtree(tmp_path / "run")
    assert main(arguments) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert "belongs to another training: text.source_0.content was" in said


@pytest.mark.slow
def test_a_model_that_changed_is_not_gone_on_with(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(20, cfg, pair, monkeypatch)
    monkeypatch.setattr(pair.a, "_weights_sha256", "another", raising=False)
    with pytest.raises(
        ValueError, match="belongs to another training: models.model_a.weights_sha256"
    ):
        CrosscoderTrainingRunner(replace(cfg, resume=True), pair).run()


@pytest.mark.slow
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
    # A run that is being replaced, killed on the way: the old one is still there, and is not taken
    # for it.
    other = replace(other, overwrite=True)
    assert stopped_and_resumed(other, pair, monkeypatch, 20) == uninterrupted(
        replace(other, overwrite=False), pair
    )


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_is_one_clear_error_and_keeps_the_one_before(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, n_saved = tensor_files.save_file, 0

    def until_full(*args: Any, **kwargs: Any) -> None:
        nonlocal n_saved
        n_saved += 1
        if n_saved > 4:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        made(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", until_full)
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
        "eval_every_n_documents": 4,
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
    assert "Resuming training from" in result.stderr
    assert saved(killed) == saved(whole)


@pytest.mark.slow
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
        patch.setattr(tensor_files, "save_file", on_a_full_disk)
        with pytest.raises(OSError, match="Could not write checkpoint"):
            CrosscoderTrainingRunner(resumed, pair).run()
    assert checkpoints(folder) == before
    # Killed between the two renames, and before the checksums were written.
    before[-1].rename(folder / f".{before[-1].name}.old.new")
    (folder / ".77.new").mkdir()
    assert stopped_and_resumed(resumed, pair, monkeypatch) == uninterrupted(cfg, pair)
    assert not [path for path in folder.glob(".*") if path.name.endswith(".new")]
