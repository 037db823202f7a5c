"""Rows of paired activations from disk: shuffled, and checked byte by byte."""

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

from sae_lens_dfc.activations import Bookmark, Marked
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.files import MAX_JSON, file_in, from_plain, read_object, tensors_in
from sae_lens_dfc.manifest import ACTS, FORMAT, MANIFEST_FILENAME, Shard, progress_path
from sae_lens_dfc.output import os_errors
from sae_lens_dfc.state import checksum


class PairedActivationsCache:
    """Rows `[x_a | x_b]` on disk, with what made them. Nothing in it is run on opening, and every byte is checked.

    Args:
        folder: What `sae-lens-dfc cache` wrote.

    Raises:
        ValueError: The folder holds no whole cache: the message says what is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        """What made the cache and what is in it."""
        self.fingerprint = checksum(self.folder / MANIFEST_FILENAME)
        """A sign of all that is in it: the manifest has every file's checksum."""
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
        """What became of the text that it was made of."""
        counts = PairCounts()
        counts.load(self.manifest["counts"])
        return counts

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """What is known of the two models, as `ModelPair.describe()` says it."""
        only_here = ("dtype", "chat_template")
        described = self.manifest["models"]
        return {n: {k: v for k, v in m.items() if k not in only_here} for n, m in described.items()}

    def shard(self, i: int) -> dict[str, Tensor]:
        """One shard's columns, mapped to memory: acts `(rows, d_a + d_b)`, and the rows' origins if they are kept.

        Raises:
            ValueError: A byte of it is not what was written.
        OSError: The file cannot be read, or is gone.
        """
        self._check([i])
        path = self.folder / self.shards[i].file
        with _readable(path):
            return load_file(path)

    def _check(self, shards: Sequence[int]) -> None:
        """Compare the checksums of those that were not compared yet."""
        for i in shards:
            if i in self._checked:
                continue
            shard, path = self.shards[i], self.folder / self.shards[i].file
            # It also brings the file into memory in order, before rows are taken from it out of order.
            with _readable(path):
                found = checksum(path)
            if found != shard.xxh3:
                raise ValueError(
                    f"{path} is damaged: its checksum is {found}, and {shard.xxh3} was written. {_REPAIR}"
                )
            claim = tensors_in(path).get(ACTS)
            if claim is None or claim.shape != (shard.rows, self.d_a + self.d_b):
                raise ValueError(
                    f"{path} does not hold the {shard.rows} rows of {self.d_a} + {self.d_b} that the manifest says. {_REPAIR}"
                )
            self._checked.add(i)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        window_shards: int = 16,
        start: Bookmark | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Marked]:
        """Shuffled batches without end, each row once in an epoch.

        In each epoch the order of shards is drawn, and rows are permuted inside a window of that many
        shards. Within a batch rows lie in the order of their shards. A batch may hold rows of two
        windows or of two epochs, so that none is lost and all are of one size.

        Args:
            batch_size: Rows in a batch.
            seed: Of the order.
            window_shards: Shards among which rows are permuted; they are mapped to memory, not held in it.
            start: Where to begin, when not at the beginning.
            share: Which process this is, and of how many that share the shards; each has epochs of its own.

        Raises:
            ValueError: There are more processes than shards.
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
                    yield Marked(
                        torch.cat(parts) if len(parts) > 1 else parts[0],
                        Bookmark({"batches": done}),
                    )
                    parts = []

    def _windows(
        self, own: Sequence[int], epoch: int, position: int, seed: int, window_shards: int
    ) -> Iterator[tuple[list[Tensor], Int[Tensor, " rows"]]]:
        """Each window's shards, and the order of its rows, from a position in an epoch on."""
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
    """A file that was there when the cache was opened may be gone by now."""
    try:
        with os_errors():
            yield
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}. {_REPAIR}") from error


def _mixed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch."""
    return int.from_bytes(xxh3_128(f"{seed} {epoch}".encode()).digest()[:7], "little")


def _gathered(window: Sequence[Tensor], rows: Int[Tensor, " n"]) -> Tensor:
    """These rows of the window, in the order of its shards: one copy from the mapped files, with no pass to reorder."""
    starts = [0, *accumulate(len(shard) for shard in window)]
    # numpy sorts 32-bit numbers several times as fast as torch.
    ordered = np.sort(rows.numpy().astype(np.int32))
    cuts = np.searchsorted(ordered, starts).tolist()
    gathered = _empty_like(window[0], len(ordered))
    for i, shard in enumerate(window):
        if cuts[i] < cuts[i + 1]:
            of_shard = torch.from_numpy(ordered[cuts[i] : cuts[i + 1]] - starts[i])
            torch.index_select(shard, 0, of_shard, out=gathered[cuts[i] : cuts[i + 1]])
    return gathered


def _empty_like(rows: Tensor, n: int) -> Tensor:
    # numpy asks for huge pages, torch does not: fresh memory for a large batch then costs more than its copy.
    memory = np.empty((n, rows.shape[1] * rows.element_size()), dtype=np.uint8)
    return torch.from_numpy(memory).view(rows.dtype)


def is_manifest(path: Path) -> bool:
    """Whether this file of that name is a cache's."""
    try:
        return {"format", "shards", "rows"} <= set(read_object(path, _room(path)))
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        ValueError: It is no cache, is not finished, is of another version, or its manifest is damaged.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        if progress_path(folder, 0).is_file():
            raise ValueError(
                f"The cache in {folder} is not finished. Go on with `sae-lens-dfc cache` and --resume."
            )
        raise ValueError(f"{folder} holds no cache. Make one with `sae-lens-dfc cache`.")
    try:
        manifest = read_object(path, _room(path))
        if (found := manifest.get("format")) == FORMAT:
            _check_manifest(manifest)
            return manifest
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} {_REPAIR}") from error
    raise ValueError(
        f"{path} is of format {found!r:.80}, and this version reads {FORMAT}. {_REPAIR}"
    )


def _room(manifest: Path) -> int:
    """Bytes that a manifest may have: it describes each of the files beside it."""
    return MAX_JSON + 500 * sum(1 for _ in manifest.parent.iterdir())


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest of which one part contradicts another, or that claims more rows than its files have room for.

    Raises:
        ValueError: It does, or something is missing or of another type.
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
    PairCounts().load(manifest["counts"])
    shards = [from_plain(Shard, shard, "A shard") for shard in manifest["shards"]]
    of_row = str_to_dtype(manifest["dtype"]).itemsize * (manifest["d_a"] + manifest["d_b"])
    if not shards or any(shard.rows < 1 or shard.rows * of_row > shard.size for shard in shards):
        raise ValueError(f"a shard is too small for the rows of {of_row} bytes that it claims.")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("a shard is named twice.")
    if sum(shard.rows for shard in shards) != manifest["rows"]:
        raise ValueError(f"its shards do not add up to {manifest['rows']} rows.")
