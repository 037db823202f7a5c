"""Wraps torch.distributed for ranks under torchrun; in a single process, collectives cost nothing.

A *rank* is one of the processes that train one crosscoder. All ranks must call the same collectives
in the same order, because each waits for the last rank. A collective returns the same bits on every
rank, so that decisions based on it agree.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Num, Shaped
from torch import Tensor

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# Set by torchrun; if any is missing, `init_process_group` would wait or fail obscurely.
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Number of ranks: 1 outside `process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank, from 0; only rank 0 logs and saves."""
    return dist.get_rank() if world_size() > 1 else 0


# --- a group of processes ---


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the process group of torchrun, if it started this process, and leave it at the end, also
    after an error.

    Args:
        device: The device setting: "cpu", or "cuda" for one GPU per rank.

    Yields:
        The device of this rank, such as "cuda:3".

    Raises:
        ValueError: Several processes cannot share the device, a variable that torchrun sets is
            missing, or there are more ranks than GPUs.

    >>> with process_group("cpu") as device:
    ...     device, rank(), world_size()
    ('cpu', 0, 1)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    own = _own_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # Ranks may finish their shares of the text hours apart.
    dist.init_process_group(BACKENDS[own.type], timeout=timedelta(days=7))
    try:
        yield str(own)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """This rank's device: its own GPU for "cuda"; in one process, the given device.

    Raises:
        ValueError: As for `process_group`.

    >>> own_device("cuda:3")
    'cuda:3'
    """
    return str(_own_device(device)) if world_size() > 1 else device


def _own_device(device: str) -> torch.device:
    asked, n = torch.device(device), os.environ["WORLD_SIZE"]
    if asked.type not in BACKENDS or asked.index is not None:
        raise ValueError(
            f"WORLD_SIZE={n} processes cannot share device={device!r}. Set device to 'cpu', or to 'cuda' for one "
            "GPU each."
        )
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={n} asks for several processes, but {', '.join(missing)} is not set. Start them by "
            f"torchrun --nproc-per-node {n}, or unset WORLD_SIZE."
        )
    if asked.type == "cpu":
        return asked
    local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= n_gpus:
        raise ValueError(
            f"LOCAL_RANK={local} has no GPU of its own: this machine has {n_gpus}. Lower --nproc-per-node."
        )
    return torch.device("cuda", local)


def wait() -> None:
    """Barrier: wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


# --- collectives ---


def all_reduce_sum(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Elementwise sum of `x` over ranks; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.SUM)


def all_reduce_min(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Elementwise minimum of `x` over ranks; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.MIN)


def all_reduce_max(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Elementwise maximum of `x` over ranks; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.MAX)


def all_reduce_any(is_so: bool) -> bool:
    """Whether `is_so` is true on any rank.

    >>> all_reduce_any(False)
    False
    """
    if world_size() == 1:
        return is_so
    device = "cuda" if dist.get_backend() == BACKENDS["cuda"] else "cpu"
    return bool(all_reduce_max(torch.tensor(int(is_so), device=device)))


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    # Shapes are the same on all ranks, so all skip an empty tensor, which not every backend
    # accepts.
    if world_size() == 1 or x.numel() == 0:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op)
    return x


def all_gather(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "ranks *shape"]:
    """Stack all ranks' `x`, which must have the same shape, by rank.

    >>> all_gather(torch.tensor([3, 5]))
    tensor([[3, 5]])
    """
    if world_size() == 1:
        return x[None]
    everyones = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(everyones, x.detach().contiguous())
    return torch.stack(everyones)


def n_rows(x: Shaped[Tensor, "n *shape"]) -> int:
    """Total number of rows of `x` over ranks.

    >>> n_rows(torch.zeros(7, 2))
    7
    """
    return int(all_reduce_sum(torch.tensor(len(x), device=x.device)))


def mean_of_rows(x: Float[Tensor, "n *shape"]) -> Float[Tensor, "*shape"]:
    """Mean over the rows of all ranks' `x`.

    >>> mean_of_rows(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    if world_size() == 1:
        return x.mean(dim=0)
    return (all_reduce_sum(x.sum(dim=0, dtype=torch.double)) / n_rows(x)).to(x.dtype)
