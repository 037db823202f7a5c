"""Rows of paired activations to disk and back: written by several threads, read shuffled, checked byte by byte."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens.util import str_to_dtype
from safetensors.torch import load_file, save
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.activations import Bookmark, Marked, PairedRows, origins
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.manifest import (
    FORMAT,
    MANIFEST_FILENAME,
    CacheHeader,
    Progress,
    Shard,
    progress_path,
)
from sae_lens_dfc.norms import NormStatistics
from sae_lens_dfc.output import replaced

ACTS = "acts"
DTYPES = ("bfloat16", "float16", "float32")


# --- writing ---


class CacheWriter:
    """Writes one process's share of a cache, whole shards at a time, and goes on where it was stopped.

    Args:
        folder: Where the cache is.
        header: What makes the cache.
        n_writers: Threads that write, while the models run on.
        rank: Which of the processes that write this cache this is.

    Raises:
        ValueError: The folder holds part of another cache.
    """

    def __init__(
        self, folder: str | Path, header: CacheHeader, n_writers: int = 2, rank: int = 0
    ) -> None:
        if header.dtype not in DTYPES:
            raise ValueError(f"A cache's dtype must be one of {DTYPES}, got {header.dtype!r}.")
        self.folder = Path(folder)
        self.header = header
        self.n_writers = n_writers
        self.rank = rank
        self.path = progress_path(self.folder, rank)
        self.progress = Progress()
        if self.path.is_file():
            self.progress, made_with = Progress.load(self.path)
            difference = header.difference(made_with)
            if difference:
                raise ValueError(
                    f"{self.folder} holds part of another cache: {difference}. Resume with the settings it was begun "
                    "with, or cache again with --overwrite."
                )

    def write(self, rows: Iterator[PairedRows], counts: PairCounts) -> None:
        """Write the rows that come after `progress.after`.

        Args:
            rows: The rows, from `progress.after` on.
            counts: What became of the text; the source of `rows` keeps it up to date.

        Raises:
            OSError: A shard could not be written. What was written before stays.
        """
        last = self.progress.after

        def read() -> Iterator[PairedRows]:
            nonlocal last
            for batch in rows:
                last = batch.after
                yield batch

        self.folder.mkdir(parents=True, exist_ok=True)
        # From here on whoever looks sees what the folder is, however early this is stopped.
        self.progress.save(self.path, self.header)
        pending: deque[tuple[Future[Shard], Progress]] = deque()
        with ThreadPoolExecutor(self.n_writers) as threads:
            try:
                shards = _shards(read(), self.progress, self.header)
                for i, (columns, progress) in enumerate(shards, start=len(self.progress.shards)):
                    path = self.folder / f"rows-{self.rank:05d}-{i:06d}.safetensors"
                    pending.append((threads.submit(_write_shard, path, columns), progress))
                    # As many as there are threads keep them busy; more would only fill the memory.
                    while pending and (len(pending) > self.n_writers or pending[0][0].done()):
                        self._finish(pending)
            finally:
                while pending:
                    self._finish(pending)
        done = replace(self.progress, after=last, skip=0, counts=counts, done=True)
        done.save(self.path, self.header)
        self.progress = done

    def _finish(self, pending: deque[tuple[Future[Shard], Progress]]) -> None:
        """Wait for the oldest shard, and count it in."""
        written, progress = pending.popleft()
        try:
            progress.shards = [*self.progress.shards, written.result()]
            progress.save(self.path, self.header)
        except OSError as error:
            # Later ones may well be written, but what counts is whole from the beginning on.
            pending.clear()
            raise OSError(
                f"Could not write to the cache in {self.folder}: {error} The {self.progress.rows} rows written "
                "before are kept: make room and run the same command with --resume."
            ) from error
        self.progress = progress


def _write_shard(path: Path, columns: dict[str, Tensor]) -> Shard:
    content = save(columns)
    with replaced(path) as temporary:
        temporary.write_bytes(content)
    return Shard(path.name, len(columns[ACTS]), len(content), xxh3_128(content).hexdigest())


def _shards(
    rows: Iterator[PairedRows], progress: Progress, header: CacheHeader
) -> Iterator[tuple[dict[str, Tensor], Progress]]:
    """Rows -> shards of equal size, each with how far it takes the cache; its file is still to be named."""
    before, skip = progress.after, progress.skip
    statistics = progress.statistics
    parts: list[dict[str, Tensor]] = []
    n = 0
    for batch in rows:
        columns = _columns(batch, header)
        while skip < len(batch.acts):
            part = {name: c[skip : skip + header.shard_rows - n] for name, c in columns.items()}
            skip, n = skip + len(part[ACTS]), n + len(part[ACTS])
            parts.append(part)
            statistics = _counted(part[ACTS], statistics, header)
            if n == header.shard_rows:
                # The batch that the shard ends in is made again on resuming: cheaper than to keep its rows aside.
                yield _joined(parts), Progress([], before, skip, statistics=statistics)
                parts, n = [], 0
        before, skip = batch.after, 0
    if n > 0:
        yield _joined(parts), Progress([], before, 0, statistics=statistics)


def _columns(batch: PairedRows, header: CacheHeader) -> dict[str, Tensor]:
    acts = batch.acts.to(str_to_dtype(header.dtype)).cpu()
    if not acts.isfinite().all():
        raise ValueError(
            f"An activation is too large for a cache in {header.dtype}. Cache in bfloat16 or float32."
        )
    return {ACTS: acts, **(origins(batch) if header.origins else {})}


def _counted(
    acts: Tensor, statistics: tuple[NormStatistics, NormStatistics], header: CacheHeader
) -> tuple[NormStatistics, NormStatistics]:
    a, b = deepcopy(statistics)
    a.update(acts[:, : header.d_a].float().norm(dim=-1))
    b.update(acts[:, header.d_a :].float().norm(dim=-1))
    return a, b


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# --- reading ---


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
        self.fingerprint = xxh3_128((self.folder / MANIFEST_FILENAME).read_bytes()).hexdigest()
        """A sign of all that is in it: the manifest has every file's checksum."""
        """What made the cache and what is in it."""
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self._checked: set[int] = set()
        for shard in self.shards:
            path = self.folder / shard.file
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
        """
        self._check([i])
        return load_file(self.folder / self.shards[i].file)

    def _check(self, shards: Sequence[int]) -> None:
        """Compare the checksums of those that were not compared yet."""
        for i in shards:
            if i in self._checked:
                continue
            shard, path = self.shards[i], self.folder / self.shards[i].file
            # It also brings the file into memory in order, before rows are taken from it out of order.
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                found = xxh3_128(content).hexdigest()
            if found != shard.xxh3:
                raise ValueError(
                    f"{path} is damaged: its checksum is {found}, and {shard.xxh3} was written. {_REPAIR}"
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
        done = 0 if start is None else int(start.values["batches"])
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
        return {"format", "shards", "rows"} <= set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
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
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        _ = known and [
            manifest[name] for name in ("rows", "d_a", "d_b", "models", "data", "shards")
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. {_REPAIR}") from error
    if not known:
        raise ValueError(
            f"{path} is of format {manifest['format']}, and this version reads {FORMAT}. {_REPAIR}"
        )
    return manifest
