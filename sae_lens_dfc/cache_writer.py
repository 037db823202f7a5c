"""Rows of paired activations to disk: whole shards, written by several threads while the models run."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from sae_lens.util import str_to_dtype
from safetensors.torch import save
from torch import Tensor
from xxhash import xxh3_128

from sae_lens_dfc.activations import PairedRows, origins
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.manifest import ACTS, CacheHeader, Progress, Shard, progress_path
from sae_lens_dfc.norms import NormStatistics
from sae_lens_dfc.output import replaced

DTYPES = ("bfloat16", "float16", "float32")
MAX_LOST = 0.01
"""Share of the largest activation that rounding may cost: bfloat16 costs 0.2 %, float16 all of what is below 6e-8."""


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
        written, progress = pending[0]
        try:
            # Asked to end, this process comes here again from wherever it was: each shard is counted in once, none is left out.
            if progress is not self.progress:
                progress.shards = [*self.progress.shards, written.result()]
                progress.save(self.path, self.header)
                self.progress = progress
        except OSError as error:
            # Later ones may well be written, but what counts is whole from the beginning on.
            pending.clear()
            raise OSError(
                f"Could not write to the cache in {self.folder}: {error} The {self.progress.rows} rows written "
                "before are kept: make room and run the same command with --resume."
            ) from error
        pending.popleft()


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
