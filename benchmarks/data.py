"""Benchmarks the data pipeline against its lower bounds: the models' forward passes, and reading
the bytes."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.provenance import provenance
from benchmarks.timing import medians, ranges, timed, write_json_results
from sae_lens_dfc.core.interrupts import interruptible
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.alignment.align import Coverage, align, pack
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.cache.build import cache_header
from sae_lens_dfc.data.cache.manifest import CacheHeader, write_manifest
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.cache.writer import CacheWriter
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.contexts import ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.sources import MAX_CHARS
from sae_lens_dfc.data.text.cleaning import clean, split_text
from sae_lens_dfc.data.text.datasets import load_texts
from sae_lens_dfc.models.hooked_model import HookedModel

FILENAME = "data.json"
BATCH_SIZE = 2048
TARGETS = {
    "harvest_ratio": ">= 0.85",
    "alignment_ratio": "<= 0.25",
    "cache_write_ratio": ">= 0.8",
    "shuffled_read_ratio": ">= 0.5",
}


@dataclass(frozen=True)
class DataPreset:
    """Sizes of the data benchmark."""

    pairs: int
    """Pairs harvested per round."""
    rounds: int
    """Rounds of all measurements in turn; a figure is the median over rounds."""
    documents: int
    """Documents tokenized and aligned per round."""
    cache_bytes: int
    """Size of the cache that is read."""


DATA_PRESETS = {
    "small": DataPreset(pairs=12_000, rounds=3, documents=150, cache_bytes=2**28),
    "full": DataPreset(pairs=20_000, rounds=7, documents=600, cache_bytes=2**32),
}


def run_data_benchmark(preset: str, pair: ModelPair, folder: Path) -> dict[str, Any]:
    """Run the data benchmark, and write `data.json` to `folder`.

    Each figure is the ratio of two times measured in succession, as the median over `rounds`;
    `spread` holds the lowest and highest round.

    Args:
        preset: Name in `DATA_PRESETS`.
        pair: The two models.
        folder: Folder for the results, and temporarily for the cached rows.
    """
    settings = DATA_PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        cache = _random_cache(Path(temporary) / "read", settings.cache_bytes, pair)
        harvest = _Harvest(pair, settings.pairs, Path(temporary))
        harvest.run(write=True)  # warm-up: excludes one-time costs such as allocating memory
        for _ in tqdm(range(settings.rounds), "Measuring", unit=" rounds"):
            rounds.append(
                {**harvest.round(), **_alignment(pair, settings.documents), **_reading(cache)}
            )
        order = _served_order(Path(temporary) / "order")
        formats = _formats(Path(temporary), settings.cache_bytes // 16, pair)
    results = {
        **medians(rounds),
        "padding_share": harvest.padding_share(),
        **{f"order/{name}": value for name, value in order.items()},
        **{f"written_gb_per_s/{name}": value for name, value in formats.items()},
        "spread": ranges(rounds),
        "rounds": rounds,
        "targets": TARGETS,
        "preset": preset,
        "models": [pair.a.name, pair.b.name],
        **provenance(),
    }
    write_json_results(results, folder / FILENAME)
    return results


# --- both models over a text ---


class _Harvest:
    """Times the same text in three ways: harvested, harvested and cached, and as bare forward
    passes over its tokens."""

    def __init__(self, pair: ModelPair, n_pairs: int, folder: Path):
        self.pair = pair
        self.cfg = CacheConfig(
            max_unique_pairs=n_pairs, cache_path=str(folder / "write"), shard_rows=1024
        )
        self.text = PairedText(self.cfg, pair)
        self.batches = list(self.text.stream("training").batches(PairCounts()))

    def round(self) -> dict[str, float]:
        bare = sum(timed(lambda m=m: self.bare(m)) for m in (self.pair.a, self.pair.b))
        live, written = timed(lambda: self.run(write=False)), timed(lambda: self.run(write=True))
        return {
            "harvest_ratio": bare / live,
            "cache_write_ratio": live / written,
            "pairs_per_second": self.n_pairs() / live,
        }

    def n_pairs(self) -> int:
        return sum(len(c.segments) - 1 for batch in self.batches for c in batch.contexts)

    def run(self, write: bool) -> None:
        counts = PairCounts()
        with interruptible(self.text.rows("training", counts)) as rows:
            if not write:
                for _ in rows:
                    pass
                return
            shutil.rmtree(self.cfg.cache_path, ignore_errors=True)
            CacheWriter(self.cfg.cache_path, cache_header(self.cfg, self.pair, self.text)).write(
                rows, counts
            )

    def bare(self, model: HookedModel) -> None:
        """Run the model on the same tokens, without padding, in full batches of full contexts."""
        size = self.cfg.context_size
        of_a = model is self.pair.a
        tokens = [c.segments.ids_a if of_a else c.segments.ids_b for c in self.contexts()]
        ids = np.concatenate(tokens)
        ids = torch.from_numpy(np.resize(ids, -(-len(ids) // size) * size)).view(-1, size)
        for batch in ids.split(self.cfg.store_batch_size_prompts):
            model.activations(batch, torch.ones_like(batch))

    def contexts(self) -> Iterator[Any]:
        return (context for batch in self.batches for context in batch.contexts)

    def padding_share(self) -> float:
        """Share of padding among the tokens that the models read."""
        return 1 - sum(map(_n_tokens, self.batches)) / sum(map(_n_read, self.batches))


def _n_tokens(batch: ContextBatch) -> int:
    return sum(len(c.segments.ids_a) + len(c.segments.ids_b) for c in batch.contexts)


def _n_read(batch: ContextBatch) -> int:
    longest = [
        max(len(c.segments.ids_a) for c in batch.contexts),
        max(len(c.segments.ids_b) for c in batch.contexts),
    ]
    return len(batch.contexts) * sum(longest)


def _alignment(pair: ModelPair, n_documents: int) -> dict[str, float]:
    tokenizing = aligning = 0.0
    for text in islice(load_texts("cpython-docs"), n_documents):
        for piece in split_text(clean(text), MAX_CHARS):
            start = time.perf_counter()
            a, b = tokenize(pair.a.tokenizer, piece), tokenize(pair.b.tokenizer, piece)
            tokenized = time.perf_counter()
            segments, _ = align(a, b)
            for _ in pack(segments, 127, Coverage()):
                pass
            tokenizing += tokenized - start
            aligning += time.perf_counter() - tokenized
    return {"alignment_ratio": aligning / tokenizing}


# --- a cache, read ---


def _random_cache(folder: Path, n_bytes: int, pair: ModelPair) -> PairedActivationsCache:
    """A cache of random rows with the pair's widths."""
    d_in = pair.d_a + pair.d_b
    n_rows = n_bytes // (2 * d_in)
    rows = torch.randn(min(n_rows, 4096), d_in)
    return _written(folder, (rows for _ in range(n_rows // len(rows))), pair.d_a, n_rows // 32)


def _written(
    folder: Path, acts: Iterator[Tensor], d_a: int, shard_rows: int, dtype: str = "bfloat16"
) -> PairedActivationsCache:
    first = next(acts)
    models = {"model_a": {"d_model": d_a}, "model_b": {"d_model": first.shape[1] - d_a}}
    header = CacheHeader(models, {}, {}, {}, dtype, shard_rows, origins=False)
    writer = CacheWriter(folder, header)

    def rows() -> Iterator[PairedRows]:
        for x in (first, *acts):
            number = torch.arange(len(x))
            yield PairedRows(x, number, number)

    writer.write(rows(), PairCounts())
    write_manifest(folder, header, [writer.progress])
    return PairedActivationsCache(folder)


def _reading(cache: PairedActivationsCache) -> dict[str, float]:
    """Time an epoch of shuffled batches against a sequential read of the same bytes, from the page
    cache and from disk."""
    plain = timed(lambda: _read_in_order(cache))
    first_epoch = timed(lambda: _read_shuffled(PairedActivationsCache(cache.folder)))
    _read_shuffled(cache)
    later_epoch = timed(lambda: _read_shuffled(cache))
    _forget(cache)
    plain_from_disk = timed(lambda: _read_in_order(cache))
    _forget(cache)
    from_disk = timed(lambda: _read_shuffled(PairedActivationsCache(cache.folder)))
    return {
        "shuffled_read_ratio": plain / later_epoch,
        "shuffled_read_ratio_first_epoch": plain / first_epoch,
        "shuffled_read_ratio_from_disk": plain_from_disk / from_disk,
    }


def _read_shuffled(cache: PairedActivationsCache) -> None:
    for _ in islice(cache.batches(BATCH_SIZE, window_shards=4), len(cache) // BATCH_SIZE):
        pass


def _read_in_order(cache: PairedActivationsCache) -> None:
    d_in = cache.d_a + cache.d_b
    for shard in cache.shards:
        path, size = cache.folder / shard.file, 2 * shard.rows * d_in
        rows = np.memmap(path, np.int16, "r", offset=shard.size - size, shape=(shard.rows, d_in))
        for i in range(0, shard.rows, BATCH_SIZE):
            torch.from_numpy(np.array(rows[i : i + BATCH_SIZE]))


def _forget(cache: PairedActivationsCache) -> None:
    """Evict the files from the page cache, as happens to a cache larger than memory."""
    for shard in cache.shards:
        with (cache.folder / shard.file).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _formats(folder: Path, n_bytes: int, pair: ModelPair) -> dict[str, float]:
    """Write throughput in GB/s of the same rows in each candidate format, best of three."""
    rows = torch.randn(n_bytes // (2 * (pair.d_a + pair.d_b)), pair.d_a + pair.d_b)
    rows = rows.to(torch.bfloat16)
    # Arrow has no bfloat16, and a list of values would be slower still.
    table = Dataset.from_dict({"acts": rows.float().numpy()})
    table.set_format("numpy")
    writers: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: save_file({"acts": rows}, folder / "rows.safetensors"),
        "torch.save": lambda: torch.save(rows, folder / "rows.pt"),
        "datasets": lambda: table.save_to_disk(str(folder / "rows")),
    }
    sizes = {name: rows.nbytes * (1 + (name == "datasets")) for name in writers}
    return {
        name: sizes[name] / 1e9 / min(timed(w) for _ in range(3)) for name, w in writers.items()
    }


def _served_order(folder: Path, n_shards: int = 64, shard_rows: int = 4096) -> dict[str, float]:
    """How close to uniform the shuffled order of rows from a cache of four windows is."""
    n = n_shards * shard_rows
    marks = torch.arange(n).float()[:, None].expand(-1, 2).contiguous()
    cache = _written(folder, iter(marks.split(shard_rows)), 1, shard_rows, "float32")
    batches = islice(cache.batches(BATCH_SIZE, window_shards=16), n // BATCH_SIZE)
    order = torch.cat([batch.acts[:, 0] for batch in batches]).long()
    beside = {"uniform": torch.randperm(n), "not_shuffled": torch.arange(n)}
    measures = order_measures(order, BATCH_SIZE)
    for kind, other in beside.items():
        for name, value in order_measures(other, BATCH_SIZE).items():
            measures[f"{kind}/{name}"] = value
    return measures


def order_measures(
    order: Int[Tensor, " n"], batch_size: int, n_blocks: int = 64
) -> dict[str, float]:
    """Two measures of how well an order is shuffled, with their values for a uniform order.

    `rank_correlation`: Spearman correlation of a row's position in the text and in the order; 0 ± 1
    / sqrt(n - 1) when uniform, 1 when nothing is shuffled. `clustering`: the text is split into
    `n_blocks` equal blocks; this is the variance of the number of rows per block and batch,
    relative to that of a uniform draw (hypergeometric). It is 1 when uniform, and larger when
    neighbors stay together; its standard deviation over batches is `clustering_std`.

    Args:
        order: Each row's position in the text, in the order in which rows are served: a permutation
            of 0 to n - 1.
        batch_size: Rows per batch; an incomplete last batch is ignored.
        n_blocks: Number of blocks of the text.

    Raises:
        ValueError: `order` is not a permutation, or there are fewer than two batches or fewer rows
            than blocks.

    >>> measures = order_measures(torch.arange(1000), batch_size=100, n_blocks=10)
    >>> measures["rank_correlation"], round(measures["clustering"])
    (1.0, 111)
    """
    n = len(order)
    if not torch.equal(order.sort().values, torch.arange(n)):
        raise ValueError(f"An order of {n} rows must contain each of 0 to {n - 1} once.")
    if n < max(2 * batch_size, n_blocks):
        raise ValueError(f"{n} rows are too few for batches of {batch_size} and {n_blocks} blocks.")
    batches = order[: n - n % batch_size].view(-1, batch_size)
    blocks = torch.nn.functional.one_hot(batches * n_blocks // n, n_blocks)
    share = torch.bincount(torch.arange(n) * n_blocks // n, minlength=n_blocks).double() / n
    expected = batch_size * share
    variance = expected * (1 - share) * (n - batch_size) / (n - 1)
    ratios = ((blocks.sum(dim=1) - expected).pow(2) / variance).mean(dim=1)
    return {
        "rank_correlation": _spearman(order),
        "rank_correlation_std": 1 / math.sqrt(n - 1),
        "clustering": float(ratios.mean()),
        "clustering_std": float(ratios.std()) / math.sqrt(len(ratios)),
    }


def _spearman(order: Int[Tensor, " n"]) -> float:
    def centered(x: Tensor) -> Float[Tensor, " n"]:
        return x.double() - (len(order) - 1) / 2

    place = centered(torch.arange(len(order)))
    return float((place * centered(order)).sum() / place.pow(2).sum())
