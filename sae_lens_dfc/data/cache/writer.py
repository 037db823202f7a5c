"""Writes paired activations to disk in whole shards, with several threads, while the models run."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import str_to_dtype
from safetensors.torch import save
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.core.atomic_write import atomic_file
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.activations import PairedRows, origins
from sae_lens_dfc.data.cache.manifest import ACTS, CacheHeader, Shard, WriterProgress, progress_path
from sae_lens_dfc.data.cache.norms import NormStatistics
from sae_lens_dfc.data.contexts import PairCounts

DTYPES = ("bfloat16", "float16", "float32")
MAX_LOST = 0.01
"""Maximum rounding error as a share of the largest activation: bfloat16 loses 0.2 %, and float16
everything below 6e-8."""


class CacheWriter:
    """Writes one rank's share of a cache in whole shards, and resumes where it was stopped.

    Args:
        folder: Folder of the cache.
        header: Settings and fingerprints that determine the cache.
        n_writers: Threads that write while the models run.
        rank: This rank.

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
        self.progress = WriterProgress()
        self.begun_with: dict[str, Any] = asdict(header)
        """The header recorded when the cache was started, as plain values."""
        if self.path.is_file():
            self.progress, self.begun_with = WriterProgress.load(self.path)
            difference = header.difference(self.begun_with)
            if difference:
                raise ValueError(
                    f"{self.folder} holds part of another cache: {difference}. Resume with the original settings, or cache "
                    "again with --overwrite."
                )

    def write(self, rows: Iterator[PairedRows], counts: PairCounts) -> None:
        """Write the rows that come after `progress.after`.

        Args:
            rows: The rows, from `progress.after` on.
            counts: Counts of the text, which the source of `rows` updates.

        Raises:
            OSError: A shard could not be written; those written before are kept.
        """
        last = self.progress.after

        def read() -> Iterator[PairedRows]:
            nonlocal last
            for batch in rows:
                last = batch.after
                yield batch

        self.folder.mkdir(parents=True, exist_ok=True)
        # Marks the folder as an unfinished cache, however early this is stopped.
        self.progress.save(self.path, self.header)
        pending: deque[tuple[Future[Shard], WriterProgress]] = deque()
        with ThreadPoolExecutor(self.n_writers) as threads:
            try:
                shards = _shards(read(), self.progress, self.header)
                for i, (columns, progress) in enumerate(shards, start=len(self.progress.shards)):
                    path = self.folder / f"rows-{self.rank:05d}-{i:06d}.safetensors"
                    pending.append((threads.submit(_write_shard, path, columns), progress))
                    # One pending shard per thread keeps all of them busy; more would only use
                    # memory.
                    while pending and (len(pending) > self.n_writers or pending[0][0].done()):
                        self._finish(pending)
            finally:
                while pending:
                    self._finish(pending)
        done = replace(self.progress, after=last, skip=0, counts=counts, done=True)
        done.save(self.path, self.header)
        self.progress = done

    def _finish(self, pending: deque[tuple[Future[Shard], WriterProgress]]) -> None:
        """Wait for the oldest shard and record it in the progress."""
        written, progress = pending[0]
        try:
            # A signal can interrupt this at any point and call it again: record each shard exactly
            # once.
            if progress is not self.progress:
                progress.shards = [*self.progress.shards, written.result()]
                progress.save(self.path, self.header)
                self.progress = progress
        except OSError as error:
            # Later shards may have been written, but only an unbroken sequence counts.
            pending.clear()
            raise OSError(
                f"Could not write to the cache in {self.folder}: {said_by(error)} The {self.progress.rows} rows written "
                "before are kept: make room and run the same command with --resume."
            ) from error
        pending.popleft()


def _write_shard(path: Path, columns: dict[str, Tensor]) -> Shard:
    content = save(columns)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return Shard(path.name, len(columns[ACTS]), len(content), xxh3_128(content).hexdigest())


def _shards(
    rows: Iterator[PairedRows], progress: WriterProgress, header: CacheHeader
) -> Iterator[tuple[dict[str, Tensor], WriterProgress]]:
    """Collect rows into shards of equal size, each with the progress after it, whose file is added
    once written."""
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
                # Resuming recomputes the batch in which the shard ends, which is cheaper than
                # storing its other rows.
                yield _joined(parts), WriterProgress([], before, skip, statistics=statistics)
                parts, n = [], 0
        before, skip = batch.after, 0
    if n > 0:
        yield _joined(parts), WriterProgress([], before, 0, statistics=statistics)


def _columns(batch: PairedRows, header: CacheHeader) -> dict[str, Tensor]:
    acts = batch.acts.to(str_to_dtype(header.dtype))
    if not acts.isfinite().all():
        raise ValueError(
            f"An activation is too large for a cache in {header.dtype}. Cache in bfloat16 or float32."
        )
    for model, inputs in (("A", slice(0, header.d_a)), ("B", slice(header.d_a, None))):
        exact, kept = batch.acts[:, inputs], acts[:, inputs]
        if len(exact) > 0 and (kept - exact).abs().max() > MAX_LOST * exact.abs().max():
            raise ValueError(
                f"Model {model}'s activations, {exact.abs().max():.2g} at most, are too small for a cache in {header.dtype}: they lose "
                f"more than {MAX_LOST:.0%}. Cache in {'float32' if header.dtype == 'bfloat16' else 'bfloat16 or float32'}."
            )
    acts = acts.cpu()
    return {ACTS: acts, **(origins(batch) if header.origins else {})}


def _counted(
    acts: Tensor, statistics: tuple[NormStatistics, NormStatistics], header: CacheHeader
) -> tuple[NormStatistics, NormStatistics]:
    a, b = map(copy, statistics)
    a.update(acts[:, : header.d_a].float().norm(dim=-1))
    b.update(acts[:, header.d_a :].float().norm(dim=-1))
    return a, b


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
