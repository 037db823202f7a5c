"""Plain values and tensors in one safetensors file, and the checksum of any file. Nothing is pickled."""

import json
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.files import check_header, parse_json

MAX_VALUES = 64_000_000
"""Bytes of a file's values: a cache that is being made names each of its files there."""


class State(NamedTuple):
    """What one file holds."""

    values: dict[str, Any]
    """What JSON can hold; its floats come back bit by bit."""
    tensors: dict[str, Tensor]


def save_state(path: Path, state: State) -> None:
    """Write a state as safetensors, its values in the file's header.

    safetensors has a temporary file beside it meanwhile, which stays if this process is killed: write into a folder that goes too.
    """
    save_file(_tensors(state), path, metadata=_metadata(state))


def state_bytes(state: State) -> bytes:
    """What `save_state` writes, for a small state whose file is to be in place whatever happens."""
    return save(_tensors(state), metadata=_metadata(state))


def _tensors(state: State) -> dict[str, Tensor]:
    whole = torch.contiguous_format
    return {n: x.detach().cpu().clone(memory_format=whole) for n, x in state.tensors.items()}


def _metadata(state: State) -> dict[str, str]:
    return {"values": json.dumps(state.values)}


def load_state(path: Path) -> State:
    """Read what `save_state` wrote.

    Raises:
        ValueError: The file is missing or damaged; the message says how, the caller what to do.
    """
    try:
        check_header(path, MAX_VALUES)
        with safe_open(path, framework="pt") as file:
            values = parse_json(file.metadata()["values"], finite=False)
            if not isinstance(values, dict):
                raise ValueError(f"its values are of type {type(values).__name__}.")
            return State(values, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def checksum(path: Path) -> str:
    """XXH3 of a file that is not empty, 128 bits; the file is then in memory, read in order."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return xxh3_128(content).hexdigest()
