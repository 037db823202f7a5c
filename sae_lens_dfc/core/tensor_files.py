"""Stores plain values and tensors in one safetensors file, without pickle, and checks safetensors
headers and file checksums."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.core.parsing import parse_json
from sae_lens_dfc.core.terminal import said_by

MAX_HEADER = 1_000_000
"""Maximum header size in bytes of a safetensors file with a few tensors."""

MAX_VALUES = 64_000_000
"""Maximum size of a file's values in bytes; the progress of a cache lists each of its shards
there."""


class State(NamedTuple):
    """The contents of one file."""

    values: dict[str, Any]
    """Values that JSON can hold; floats are restored exactly."""
    tensors: dict[str, Tensor]


def save_state(path: Path, state: State) -> None:
    """Write a state as safetensors, with its values in the file's header.

    safetensors writes to a temporary file beside `path`, which remains if this process is killed,
    so write into a temporary folder.
    """
    save_file(_tensors(state), path, metadata=_metadata(state))


def state_bytes(state: State) -> bytes:
    """The bytes that `save_state` writes, for a small state that is to be written atomically."""
    return save(_tensors(state), metadata=_metadata(state))


def _tensors(state: State) -> dict[str, Tensor]:
    whole = torch.contiguous_format
    return {n: x.detach().cpu().clone(memory_format=whole) for n, x in state.tensors.items()}


def _metadata(state: State) -> dict[str, str]:
    return {"values": json.dumps(state.values)}


def load_state(path: Path) -> State:
    """Read what `save_state` wrote.

    Raises:
        ValueError: The file is missing or damaged; the caller adds what to do.
    """
    with _opened(path) as (values, file):
        return State(values, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def load_values(path: Path) -> dict[str, Any]:
    """Read only the values that `save_state` wrote.

    Raises:
        ValueError: As for `load_state`.
    """
    with _opened(path) as (values, _):
        return values


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open a file and read its values."""
    try:
        check_header(path, MAX_VALUES)
        with safe_open(path, framework="pt") as file:
            values = parse_json(file.metadata()["values"], finite=False)
            if not isinstance(values, dict):
                raise ValueError(f"its values are of type {type(values).__name__}.")
            yield values, file
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(said_by(error)) from error


def checksum(path: Path) -> str:
    """128-bit XXH3 checksum of a non-empty file; also reads the file sequentially into the page
    cache."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return xxh3_128(content).hexdigest()


def file_in(folder: Path, name: str) -> Path:
    """Path of a file directly in a folder, by an untrusted name.

    Raises:
        ValueError: The name is a path, or a link that leads out of the folder.

    >>> file_in(Path("."), "../secret")
    Traceback (most recent call last):
    ...
    ValueError: '../secret' is not the name of a file in '.': it leads elsewhere.
    """
    path = folder / name
    is_name = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    if not is_name or (path.is_symlink() and path.resolve().parent != folder.resolve()):
        raise ValueError(
            f"{name!r:.200} is not the name of a file in {str(folder)!r}: it leads elsewhere."
        )
    return path


class TensorClaim(NamedTuple):
    """Dtype and shape of one tensor, as claimed by a safetensors header."""

    dtype: str
    """As safetensors names it, e.g. F32."""
    shape: tuple[int, ...]


def tensors_in(path: Path) -> dict[str, TensorClaim]:
    """Dtype and shape of each tensor in a safetensors file, from its header alone, which
    safetensors checks against the size of the file.

    Raises:
        ValueError: The file is damaged, or its header is larger than `MAX_HEADER`.
        OSError: It does not exist or cannot be read.
    """
    try:
        check_header(path, MAX_HEADER)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorClaim(str(one.get_dtype()), tuple(one.get_shape()))
                for name, one in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged: {said_by(error)} Restore it, or make it again."
        ) from error


def check_header(path: Path, max_header: int) -> None:
    """Refuse a safetensors file whose header is larger than `max_header`, before the header is
    read.

    Raises:
        ValueError: The header is larger, or `path` is not a file.
        OSError: The file does not exist or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > max_header:
        raise ValueError(
            f"{path} claims a header of {length:,} bytes; no file of its kind has more than {max_header:,}."
        )
