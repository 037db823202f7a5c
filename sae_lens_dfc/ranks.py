"""What a process knows of its siblings under torchrun, and what they settle together. Alone, all of it is free.

A *rank* is one of the processes that train one crosscoder. What all of them call must be called by all
of them, in the same order: a collective waits for the last. Each gives every rank the same bits, so
that decisions made on its result are the same everywhere.
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
# torchrun sets them; without any one of them `init_process_group` would wait or fail obscurely.
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Number of ranks: 1 outside `process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0, which alone logs and saves."""
    return dist.get_rank() if world_size() > 1 else 0


# --- a group of processes ---


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, and leave them at the end, also after an error.

    Args:
        device: As in one process: "cpu", or "cuda" for each rank's own GPU.

    Yields:
        The device of this rank, such as "cuda:3".

    Raises:
        ValueError: The device is not for several processes, torchrun did not set all it should, or there are
            more ranks than GPUs.

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
    # Shares of a text end hours apart, and whoever is done waits.
    dist.init_process_group(BACKENDS[own.type], timeout=timedelta(days=7))
    try:
        yield str(own)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """This rank's device: of "cuda" its own GPU; in one process the device itself.

    Raises:
        ValueError: As `process_group`.

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
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


# --- what ranks settle together ---


def total(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The sum of all ranks' `x`, elementwise; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.SUM)


def smallest(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The smallest of all ranks' `x`, elementwise; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.MIN)


def largest(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The largest of all ranks' `x`, elementwise; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.MAX)


def anyone(is_so: bool) -> bool:
    """Whether it is so on any rank.

    >>> anyone(False)
    False
    """
    if world_size() == 1:
        return is_so
    device = "cuda" if dist.get_backend() == BACKENDS["cuda"] else "cpu"
    return bool(largest(torch.tensor(int(is_so), device=device)))


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    # Shapes are the same everywhere, so all ranks leave out an empty one, which not every backend takes.
    if world_size() == 1 or x.numel() == 0:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op)
    return x


def gathered(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "ranks *shape"]:
    """All ranks' `x`, which have one shape, by rank.

    >>> gathered(torch.tensor([3, 5]))
    tensor([[3, 5]])
    """
    if world_size() == 1:
        return x[None]
    everyones = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(everyones, x.detach().contiguous())
    return torch.stack(everyones)


def n_rows(x: Shaped[Tensor, "n *shape"]) -> int:
    """Number of rows of all ranks' `x` together.

    >>> n_rows(torch.zeros(7, 2))
    7
    """
    return int(total(torch.tensor(len(x), device=x.device)))


def mean_of_rows(x: Float[Tensor, "n *shape"]) -> Float[Tensor, "*shape"]:
    """The mean over the rows of all ranks' `x`.

    >>> mean_of_rows(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    if world_size() == 1:
        return x.mean(dim=0)
    return (total(x.sum(dim=0, dtype=torch.double)) / n_rows(x)).to(x.dtype)
