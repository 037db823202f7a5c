"""What a training takes, against numbers by hand and against what it then takes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from sae_lens_dfc import CrosscoderRunnerConfig, CrosscoderTrainingRunner
from sae_lens_dfc.data.activations import StatefulBatch, StreamState
from sae_lens_dfc.data.batches import shuffled
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.checkpoint import checkpoints
from sae_lens_dfc.training.preflight.estimate import (
    Memory,
    Speed,
    checkpoint_size,
    crosscoder_memory,
    disk,
    harvest_of,
    rows_memory,
    times,
    weights_of,
)
from tests.helpers import TOPK_MAKERS, dfc_config, make_dfc, write_pages

SPEED = Speed(reading=1000, harvest=100, step=0.5)


@pytest.fixture
def cfg() -> CrosscoderRunnerConfig:
    """Eight steps of 10 pairs, two batches for the normalization, and a buffer of four batches of
    which half is kept back."""
    return CrosscoderRunnerConfig(
        sae=dfc_config(),
        training_tokens=80,
        train_batch_size_tokens=10,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        prefetch_llm_batches=0,
    )


def test_the_buffer_is_filled_as_often_as_its_batches_are_used_up(
    cfg: CrosscoderRunnerConfig,
) -> None:
    # 40 pairs, of which 20 are handed out at each fill: ten batches are five fills.
    assert harvest_of(cfg) == (120, 5)
    # One batch waits, and another is in the hand of the thread that makes them: twelve are six
    # fills.
    assert harvest_of(replace(cfg, prefetch_llm_batches=1)) == (140, 6)
    assert harvest_of(replace(cfg, keep_in_memory=True), of_a_pass=30.5).pairs == 30
    assert harvest_of(replace(cfg, keep_in_memory=True), of_a_pass=500).pairs == 120


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n_in_buffer", [1, 2, 7, 20])
def test_the_pairs_to_harvest_are_those_that_the_shuffle_draws(
    cfg: CrosscoderRunnerConfig, mix: float, n_in_buffer: int
) -> None:
    cfg = replace(cfg, activations_mixing_fraction=mix, n_batches_in_buffer=n_in_buffer)
    n_drawn = 0

    def rows(place: StreamState | None) -> Iterator[StatefulBatch]:  # noqa: ARG001
        nonlocal n_drawn
        while True:
            n_drawn += 1
            yield StatefulBatch(torch.zeros(1, 1), StreamState())

    n_batches = cfg.training_steps + cfg.n_batches_for_norm_estimate
    list(islice(shuffled(rows, 10, 10 * n_in_buffer, mix), n_batches))
    assert harvest_of(cfg).pairs == n_drawn


def test_the_times_of_models_and_steps_add_up_where_they_share_a_device(
    cfg: CrosscoderRunnerConfig,
) -> None:
    took = times(cfg, SPEED)
    assert took == pytest.approx((0.12, 1.2, 4.0))
    assert took.total == pytest.approx(5.32)


def test_steps_made_ahead_on_a_device_of_their_own_cost_no_time(
    cfg: CrosscoderRunnerConfig,
) -> None:
    apart = replace(
        cfg,
        model_a=ModelConfig(device="cuda"),
        model_b=ModelConfig(device="cuda:1"),
        prefetch_llm_batches=1,
    )
    # 140 pairs in six fills take 1.4 s. In each the two batches made ahead take 1 s, and models
    # only 1.4 / 6.
    assert times(apart, SPEED) == pytest.approx((0.14, 1.4, 4.0 - 1.4))
    # Where the models take 10 s for a fill, all eight steps are made meanwhile.
    slow = Speed(reading=1000, harvest=140 / 60, step=0.5)
    assert times(apart, slow).steps == 0


def test_weights_are_those_of_a_crosscoder() -> None:
    for make in TOPK_MAKERS.values():
        crosscoder = make()
        n_bytes = sum(p.numel() * p.element_size() for p in crosscoder.parameters())
        # A tie by a map has a map besides.
        assert weights_of(crosscoder.cfg, crosscoder.cfg.d_in) == pytest.approx(n_bytes, rel=0.02)
    double = make_dfc(dtype="float64").cfg
    assert weights_of(double, 12) == 2 * weights_of(dfc_config(), 12)


def test_memory_is_four_copies_of_the_weights_and_the_rows_of_the_buffer(
    cfg: CrosscoderRunnerConfig,
) -> None:
    # 2 x 12 x 24 + 24 + 12 weights.
    assert crosscoder_memory(cfg, 12) == 4 * 4 * 612
    assert crosscoder_memory(replace(cfg, other_saes=[dfc_config()]), 12) == 2 * 4 * 4 * 612
    assert rows_memory(cfg, 12) == 2.5 * 40 * 12 * 4
    assert rows_memory(replace(cfg, keep_in_memory=True), 12, of_a_pass=50) == (100 + 50) * 12 * 4
    assert Memory(opening=9, models=5, crosscoder=1, rows=1).total == 9
    assert Memory(opening=6, models=5, crosscoder=1, rows=1).total == 7


def test_disk_has_the_run_and_three_checkpoints_at_the_most(cfg: CrosscoderRunnerConfig) -> None:
    assert disk(cfg, 12).total == 0
    cfg = replace(cfg, output_path="run", checkpoint_path="c", n_checkpoints=10)
    written = disk(cfg, 12, of_a_pass=50)
    assert written.run == 4 * 612
    assert written.checkpoints == 3 * (3 * 4 * 612 + 40 * 12 * 4)
    assert written.cache == 50 * 12 * 2
    assert disk(replace(cfg, n_checkpoints=1), 12).checkpoints == 3 * 4 * 612 + 40 * 12 * 4


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_is_said(
    llama_config: ModelConfig, gpt2_config: ModelConfig, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    write_pages(text, 12)
    cfg = CrosscoderRunnerConfig(
        sae=dfc_config(d_a=16, d_b=24, d_sae=4096),
        model_a=llama_config,
        model_b=gpt2_config,
        dataset_path=str(text),
        context_size=48,
        training_tokens=64 * 8,
        train_batch_size_tokens=64,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=1,
        n_checkpoints=2,
        checkpoint_path=str(tmp_path / "c"),
    )
    CrosscoderTrainingRunner(cfg).run()
    first, *_ = checkpoints(tmp_path / "c")
    written = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    assert 0.8 * checkpoint_size(cfg, 40) < written < 1.05 * checkpoint_size(cfg, 40)
