"""Two ranks on CPU against one process: the same code trains in both, on halves and on whole
batches."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from sae_lens_dfc.core import distributed
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.selection import keep_largest, kth_largest
from sae_lens_dfc.training.data_parallel import data_parallel, for_this_rank
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer
from tests.helpers import (
    make_delta,
    make_dfc,
    make_dsf,
    make_mapped_dsf,
    make_standard,
    sae_trainer_config,
)
from tests.reliability.children import START_METHOD

N_RANKS = 2
ROWS = 64  # of all ranks together
STEPS = 20
PATIENCE_S = 150

Make = Callable[[], TrainingCrosscoder[Any]]
CASES: dict[str, Make] = {
    "dfc": partial(
        make_dfc,
        k=3,
        k_initial=8,
        k_anneal_steps=8,
        k_aux=4,
        reassign_steps=[10, 18],
        evidence_window=8,
    ),
    "dfc by partition": partial(make_dfc, k=3, selection="partition", normalization="median_norm"),
    "sparse dfc": partial(
        make_dfc, k=3, k_aux=4, training_path="sparse", reassign_steps=[18], evidence_window=8
    ),
    "sparse delta": partial(make_delta, k=3, training_path="sparse"),
    "standard": make_standard,
    "dsf": partial(make_dsf, k=3),
    "dsf by a map": partial(make_mapped_dsf, k=3),
    "delta": partial(make_delta, k=3),
}


def batches(d_in: int) -> Iterator[Tensor]:
    """Rows of eight sparse features, each in both models: no exclusive latent can hold. Later rows
    are louder."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, d_in, generator=generator)
    loudness = torch.linspace(0.5, 2, ROWS)[:, None]
    while True:
        strengths = torch.rand(ROWS, 8, generator=generator)
        fires = torch.rand(ROWS, 8, generator=generator) < 0.3
        noise = torch.randn(ROWS, d_in, generator=generator)
        yield ((strengths * fires) @ directions + noise / 50) * loudness + 3


def own_rows(batch: Tensor) -> Tensor:
    return batch.chunk(distributed.world_size())[distributed.rank()]


def trainer_config() -> SAETrainerConfig:
    return sae_trainer_config(ROWS, STEPS, dead_feature_window=3)


def train(make: Make) -> dict[str, Any]:
    """A whole training, and what is left of it, on whichever ranks there are."""
    torch.manual_seed(distributed.rank())  # other weights on each: the first rank's must win
    crosscoder = make()
    rows = (own_rows(batch) for batch in batches(crosscoder.cfg.d_in))
    trainer = CrosscoderSAETrainer(for_this_rank(trainer_config()), crosscoder, rows)
    with data_parallel(trainer):
        trained = trainer.fit()
    return {
        "state": {name: value.clone() for name, value in trained.state_dict().items()},
        "is plain": trained is crosscoder and "training_forward_pass" not in vars(crosscoder),
        "counts": {
            "steps since it fired": trainer.n_forward_passes_since_fired,
            "firings": trainer.act_freq_scores,
            "firing rates": trainer.feature_sparsity,
            "samples": torch.tensor(trainer.n_training_samples),
            "l0": torch.tensor(trained.cfg.metadata.l0),
        },
        "partition": trained.partition.sizes,
    }


# --- two processes ---


def scores(kind: str) -> Tensor:
    """Scores of 40 rows, the second rank's larger; in "ties" five of six have an equal, in "few"
    most are negative."""
    values = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    values[20:] *= 3
    return {"distinct": values, "ties": values.round(), "few": values - 6}[kind]


def refused_step(make: Make) -> str:
    trainer = CrosscoderSAETrainer(
        trainer_config(), make(), batches(make().cfg.d_in)
    )  # whole batches on each
    try:
        with data_parallel(trainer):
            trainer.fit()
    except ValueError as error:
        return str(error)
    return ""


def in_one_of_two_ranks(rank: int, port: int, folder: Path) -> None:
    """Everything that is to be seen of two ranks, in one pair of processes: they take seconds to
    start."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen: dict[str, Any] = {}
    try:
        with distributed.process_group("cpu") as device:
            seen["ranks"] = (device, distributed.rank(), distributed.world_size())
            seen["smallest, largest"] = [
                f(torch.tensor(rank))
                for f in (distributed.all_reduce_min, distributed.all_reduce_max)
            ]
            kinds = ("distinct", "ties", "few")
            seen["kept"] = {kind: keep_largest(own_rows(scores(kind)), 2.5) for kind in kinds}
            seen["trained"] = {name: train(make) for name, make in CASES.items()}
            seen["refused"] = refused_step(CASES["standard"])
            raise InterruptedError
    except InterruptedError:
        seen["is in a group after an error"] = dist.is_initialized()
    torch.save(seen, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What two processes saw, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = start_processes(
        in_one_of_two_ranks, (port, folder), N_RANKS, join=False, start_method=START_METHOD
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        started: list[Any] = context.processes
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(N_RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: train(make) for name, make in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_the_weights_of_one_process_with_the_whole_batch(
    name: str, both: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    ours = both[0]["trained"][name]
    torch.testing.assert_close(ours["state"], alone[name]["state"], atol=1e-5, rtol=1e-5)
    assert ours["partition"] == alone[name]["partition"]


@pytest.mark.parametrize("name", CASES)
def test_the_trainers_counts_are_those_of_all_ranks(
    name: str, both: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    for seen in both:
        assert_equal(seen["trained"][name]["counts"], alone[name]["counts"])


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_last_bit(name: str, both: list[dict[str, Any]]) -> None:
    one, other = (seen["trained"][name] for seen in both)
    assert_equal(one["state"], other["state"])
    assert one["partition"] == other["partition"]


def test_the_comparison_has_dead_latents_and_latents_that_moved(
    alone: dict[str, dict[str, Any]],
) -> None:
    since_fired = alone["dfc"]["counts"]["steps since it fired"]
    assert 0 < (since_fired > 3).sum() < 24
    assert alone["dfc"]["partition"] != CASES["dfc"]().partition.sizes


@pytest.mark.parametrize("kind", ["distinct", "few"])
def test_two_ranks_keep_what_one_process_keeps(kind: str, both: list[dict[str, Any]]) -> None:
    kept = torch.cat([seen["kept"][kind] for seen in both])
    assert torch.equal(kept, keep_largest(scores(kind), 2.5))
    assert (kept[:20] > 0).sum() < (kept[20:] > 0).sum()  # not each rank its half


def test_exactly_k_for_each_row_of_all_ranks_are_kept_whatever_ties(
    both: list[dict[str, Any]],
) -> None:
    kept = torch.cat([seen["kept"]["ties"] for seen in both])
    assert (kept > 0).sum() == 2.5 * 40
    values, best = kept[kept > 0], scores("ties").flatten().topk(100).values
    assert torch.equal(values.sort().values, best.sort().values)


def test_ranks_know_each_other(both: list[dict[str, Any]]) -> None:
    assert [seen["ranks"] for seen in both] == [("cpu", 0, 2), ("cpu", 1, 2)]
    assert all(seen["smallest, largest"] == [0, 1] for seen in both)


def test_the_crosscoder_is_plain_again_after_training(both: list[dict[str, Any]]) -> None:
    assert all(seen["trained"][name]["is plain"] for seen in both for name in CASES)


def test_a_whole_batch_on_each_rank_is_refused(both: list[dict[str, Any]]) -> None:
    assert both[1]["refused"] == (
        "Rank 1 got a batch of 64, but 2 processes share train_batch_size_samples=64. Make batches of 32 on each."
    )


def test_an_error_leaves_no_group_behind(both: list[dict[str, Any]]) -> None:
    assert not any(seen["is in a group after an error"] for seen in both)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, atol=0, rtol=0)


# --- one process ---


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.data())
def test_the_kth_largest_is_that_of_a_sorted_list(values: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(torch.tensor(values), k) == sorted(values, reverse=True)[k - 1]


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


def test_only_rank_0_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    log = LoggingConfig(log_to_wandb=True)
    cfg = replace(trainer_config(), logger=log)
    for rank in (0, 1):
        pretend(monkeypatch, rank, 2)
        assert for_this_rank(cfg).logger.log_to_wandb == (rank == 0)
    assert log.log_to_wandb  # the caller's own is not touched


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="samples=64 does not divide into 3 processes"):
        for_this_rank(trainer_config())


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "WORLD_SIZE=2 processes cannot share device='cuda:1'"),
        ("mps", "cannot share device='mps'. Set device to 'cpu', or to 'cuda'"),
        ("cpu", "LOCAL_RANK, MASTER_PORT is not set. Start them by torchrun --nproc-per-node 2"),
    ],
)
def test_processes_that_cannot_join_are_told_why(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in distributed.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.process_group(device):
        pass


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", *distributed.ENVIRONMENT):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match="LOCAL_RANK=2 has no GPU of its own: this machine has 2"),
        distributed.process_group("cuda"),
    ):
        pass
