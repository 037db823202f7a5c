"""Reads paired activations from a cache on disk, shuffled and verified by checksum."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens.util import str_to_dtype
from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.core.atomic_write import os_errors
from sae_lens_dfc.core.parsing import MAX_JSON, read_object
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.tensor_files import checksum, file_in, tensors_in
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.activations import StatefulBatch, StreamState
from sae_lens_dfc.data.cache.manifest import ACTS, FORMAT, MANIFEST_FILENAME, Shard, progress_path
from sae_lens_dfc.data.contexts import PairCounts


class PairedActivationsCache:
    """Activation rows `[x_a | x_b]` on disk, with their manifest. Opening it runs no code from it,
    and every byte is verified by checksum before use.

    Args:
        folder: Folder that `sae-lens-dfc cache` wrote.

    Raises:
        ValueError: The folder holds no complete cache; the message names what is missing or
            damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        """Header and contents of the cache."""
        self.fingerprint = checksum(self.folder / MANIFEST_FILENAME)
        """Checksum of the manifest, which holds every shard's checksum."""
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self._checked: set[int] = set()
        for shard in self.shards:
            path = file_in(self.folder, shard.file)
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.size:
                raise ValueError(
                    f"{path} holds {size} bytes, and {shard.size} were written: it is truncated or missing. {_REPAIR}"
                )

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.manifest["rows"])

    @property
    def d_a(self) -> int:
        return int(self.manifest["d_a"])

    @property
    def d_b(self) -> int:
        return int(self.manifest["d_b"])

    @cached_property
    def counts(self) -> PairCounts:
        """Counts of the text that the cache was made from."""
        return from_plain(PairCounts, self.manifest["counts"], "The counts")

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Description of the two models, as `ModelPair.describe()` returns it."""
        only_here = ("dtype", "chat_template")
        described = self.manifest["models"]
        return {n: {k: v for k, v in m.items() if k not in only_here} for n, m in described.items()}

    def shard(self, i: int) -> dict[str, Tensor]:
        """One shard's columns, memory-mapped: acts `(rows, d_a + d_b)`, and the rows' origins if
        stored.

        Raises:
            ValueError: Its checksum or shape is wrong.
            OSError: The file cannot be read.
        """
        self._check([i])
        path = self.folder / self.shards[i].file
        with _readable(path):
            return load_file(path)

    def _check(self, shards: Sequence[int]) -> None:
        """Verify the checksums of shards that have not been verified yet."""
        for i in shards:
            if i in self._checked:
                continue
            shard, path = self.shards[i], self.folder / self.shards[i].file
            # This also reads the file sequentially into the page cache, before rows are read at
            # random.
            with _readable(path):
                found = checksum(path)
            if found != shard.xxh3:
                raise ValueError(
                    f"{path} is damaged: its checksum is {found}, expected {shard.xxh3}. {_REPAIR}"
                )
            claim = tensors_in(path).get(ACTS)
            if claim is None or claim.shape != (shard.rows, self.d_a + self.d_b):
                raise ValueError(
                    f"{path} does not hold the {shard.rows} rows of {self.d_a} + {self.d_b} that the manifest records. {_REPAIR}"
                )
            self._checked.add(i)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        window_shards: int = 16,
        start: StreamState | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[StatefulBatch]:
        """Shuffled batches without end, with each row once per epoch.

        Each epoch shuffles the shards, and permutes rows within a window of `window_shards` shards.
        Rows of a batch are in the order of their shards. A batch may span two windows or two
        epochs, so that no row is lost and all batches have the same size.

        Args:
            batch_size: Rows per batch.
            seed: Seed of the order.
            window_shards: Shards among which rows are permuted; they are memory-mapped, not loaded.
            start: State to resume from, if not at the beginning.
            share: This rank and the number of ranks that share the shards; each rank has its own
                epochs.

        Raises:
            ValueError: There are more ranks than shards.
        """
        rank, world_size = share
        own = range(rank, len(self.shards), world_size)
        if not own:
            raise ValueError(
                f"{self.folder} has {len(self.shards)} shards, too few for {world_size} processes. Cache with a smaller "
                "shard_rows, or train with fewer."
            )
        done = 0 if start is None else start.number("batches")
        n_rows = sum(self.shards[i].rows for i in own)
        epoch, position = divmod(done * batch_size, n_rows)
        parts: list[Tensor] = []
        for window, order in self._windows(own, epoch, position, seed, window_shards):
            head = batch_size - sum(map(len, parts))
            for rows in (order[:head], *order[head:].split(batch_size)):
                if len(rows) == 0:
                    continue
                parts.append(_gathered(window, rows))
                if sum(map(len, parts)) == batch_size:
                    done += 1
                    yield StatefulBatch(
                        torch.cat(parts) if len(parts) > 1 else parts[0],
                        StreamState({"batches": done}),
                    )
                    parts = []

    def _windows(
        self, own: Sequence[int], epoch: int, position: int, seed: int, window_shards: int
    ) -> Iterator[tuple[list[Tensor], Int[Tensor, " rows"]]]:
        """Each window's shards and the order of its rows, from a position in an epoch on."""
        plan = self._plan(own, epoch, position, seed, window_shards)
        with ThreadPoolExecutor(1) as ahead:
            window, order = next(plan)
            checked = ahead.submit(self._check, window)
            while True:
                following, following_order = next(plan)
                checked.result()
                checked = ahead.submit(self._check, following)
                yield [self.shard(i)[ACTS] for i in window], order
                window, order = following, following_order

    def _plan(
        self, own: Sequence[int], epoch: int, position: int, seed: int, window_shards: int
    ) -> Iterator[tuple[list[int], Int[Tensor, " rows"]]]:
        for epoch in count(epoch):
            draws = torch.Generator().manual_seed(_mixed(seed, epoch))
            shards = [own[i] for i in torch.randperm(len(own), generator=draws).tolist()]
            for first in range(0, len(shards), window_shards):
                window = shards[first : first + window_shards]
                n = sum(self.shards[i].rows for i in window)
                order = torch.randperm(n, generator=draws)
                if position < n:
                    yield window, order[position:]
                position = max(0, position - n)


_REPAIR = "Restore it, or make the cache again with `sae-lens-dfc cache --overwrite`."


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Re-raise read errors with advice: a file may have been removed since the cache was opened."""
    try:
        with os_errors():
            yield
    except OSError as error:
        raise OSError(f"{path} cannot be read: {said_by(error)} {_REPAIR}") from error


def _mixed(seed: int, epoch: int) -> int:
    """A different seed for each epoch."""
    return int.from_bytes(xxh3_128(f"{seed} {epoch}".encode()).digest()[:7], "little")


def _gathered(window: Sequence[Tensor], rows: Int[Tensor, " n"]) -> Tensor:
    """Gather rows of a window in shard order, with one copy from the memory-mapped files."""
    starts = [0, *accumulate(len(shard) for shard in window)]
    # numpy sorts 32-bit integers several times as fast as torch.
    ordered = np.sort(rows.numpy().astype(np.int32))
    cuts = np.searchsorted(ordered, starts).tolist()
    gathered = _empty_like(window[0], len(ordered))
    for i, shard in enumerate(window):
        if cuts[i] < cuts[i + 1]:
            of_shard = torch.from_numpy(ordered[cuts[i] : cuts[i + 1]] - starts[i])
            torch.index_select(shard, 0, of_shard, out=gathered[cuts[i] : cuts[i + 1]])
    return gathered


def _empty_like(rows: Tensor, n: int) -> Tensor:
    # numpy requests huge pages and torch does not; without them, allocating a large batch costs
    # more than copying it.
    memory = np.empty((n, rows.shape[1] * rows.element_size()), dtype=np.uint8)
    return torch.from_numpy(memory).view(rows.dtype)


def is_manifest(path: Path) -> bool:
    """Whether a file named like a manifest is that of a cache."""
    try:
        return {"format", "shards", "rows"} <= set(read_object(path, _room(path)))
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a cache.

    Raises:
        ValueError: The folder holds no cache, the cache is unfinished or has another format, or its
            manifest is damaged.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        if progress_path(folder, 0).is_file():
            raise ValueError(
                f"The cache in {folder} is not finished. Resume it with `sae-lens-dfc cache` and --resume."
            )
        raise ValueError(f"{folder} holds no cache. Make one with `sae-lens-dfc cache`.")
    try:
        manifest = read_object(path, _room(path))
        if (found := manifest.get("format")) == FORMAT:
            _check_manifest(manifest)
            return manifest
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {said_by(error)} {_REPAIR}") from error
    raise ValueError(
        f"{path} has format {found!r:.80}, and this version reads format {FORMAT}. {_REPAIR}"
    )


def _room(manifest: Path) -> int:
    """Maximum size of a manifest in bytes, which grows with the number of shard files beside it."""
    return MAX_JSON + 500 * sum(1 for _ in manifest.parent.iterdir())


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that contradicts itself or claims more rows than its files can hold.

    Raises:
        ValueError: It does, or an entry is missing or has another type.
    """
    kinds: dict[str, type] = {"rows": int, "d_a": int, "d_b": int, "dtype": str, "shards": list}
    kinds |= dict.fromkeys(("models", "configs", "data", "counts"), dict)
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"{name} is {manifest.get(name)!r:.80}.")
    for name in ("model_a", "model_b"):
        model, width = manifest["models"].get(name), manifest[f"d_{name[-1]}"]
        if not isinstance(model, dict) or model.get("d_model") != width or width < 1:
            raise ValueError(f"{name} is not {width} wide.")
    from_plain(PairCounts, manifest["counts"], "The counts")
    shards = [from_plain(Shard, shard, "A shard") for shard in manifest["shards"]]
    of_row = str_to_dtype(manifest["dtype"]).itemsize * (manifest["d_a"] + manifest["d_b"])
    if not shards or any(shard.rows < 1 or shard.rows * of_row > shard.size for shard in shards):
        raise ValueError(f"a shard is too small for the rows of {of_row} bytes that it claims.")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("a shard is named twice.")
    if sum(shard.rows for shard in shards) != manifest["rows"]:
        raise ValueError(f"its shards do not add up to {manifest['rows']} rows.")
