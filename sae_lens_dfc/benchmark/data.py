"""How much the data's way costs beside what cannot be avoided: the models' forward passes, and reading the bytes."""

import logging
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
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.alignment import Coverage, align, pack
from sae_lens_dfc.benchmark.figures import medians, ranges, timed, write_results
from sae_lens_dfc.benchmark.provenance import provenance
from sae_lens_dfc.cache import PairedActivationsCache
from sae_lens_dfc.cache_writer import CacheWriter
from sae_lens_dfc.contexts import ContextBatch, PairCounts
from sae_lens_dfc.manifest import CacheHeader, write_manifest
from sae_lens_dfc.metrics.shuffle import order_measures
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.sources import MAX_CHARS
from sae_lens_dfc.stopping import interruptible
from sae_lens_dfc.texts import clean, load_texts, split_text
from sae_lens_dfc.tokens import tokenize
from sae_lens_dfc.training.caching import CacheConfig, cache_header
from sae_lens_dfc.training.data import PairedText

logger = logging.getLogger(__name__)

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
    """How long to measure."""

    pairs: int
    """Pairs harvested in a round."""
    rounds: int
    """Rounds of everything, one after the other; a figure is the median over them."""
    documents: int
    """Documents tokenised and aligned in a round."""
    cache_bytes: int
    """Size of the cache that is read."""


DATA_PRESETS = {
    "small": DataPreset(pairs=12_000, rounds=3, documents=150, cache_bytes=2**28),
    "full": DataPreset(pairs=20_000, rounds=7, documents=600, cache_bytes=2**32),
}


def run_data_benchmark(preset: str, pair: ModelPair, folder: Path) -> dict[str, Any]:
    """Measure, and write `data.json` into `folder`.

    Each figure is a ratio of two times measured one after the other, the median over `rounds`; `spread` has the
    lowest and highest round.

    Args:
        preset: Name in `DATA_PRESETS`.
        pair: The two models.
        folder: Takes the results, and for a while the rows that are cached.
    """
    settings = DATA_PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        cache = _random_cache(Path(temporary) / "read", settings.cache_bytes, pair)
        harvest = _Harvest(pair, settings.pairs, Path(temporary))
        harvest.run(
            write=True
        )  # what is done once only, such as allocating memory, is not measured
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
    write_results(results, folder / FILENAME)
    return results


# --- both models over a text ---


class _Harvest:
    """The same text harvested, harvested and written, and its tokens run through the bare models."""

    def __init__(self, pair: ModelPair, n_pairs: int, folder: Path):
        self.pair = pair
        self.cfg = CacheConfig(
            training_pairs=n_pairs, cache_path=str(folder / "write"), shard_rows=1024
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
        """The same tokens, without padding, in whole batches of whole contexts."""
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
        """Share of padding in what the models read."""
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
    tokenising = aligning = 0.0
    for text in islice(load_texts("cpython-docs"), n_documents):
        for piece in split_text(clean(text), MAX_CHARS):
            start = time.perf_counter()
            a, b = tokenize(pair.a.tokenizer, piece), tokenize(pair.b.tokenizer, piece)
            tokenised = time.perf_counter()
            segments, _ = align(a, b)
            for _ in pack(segments, 127, Coverage()):
                pass
            tokenising += tokenised - start
            aligning += time.perf_counter() - tokenised
    return {"alignment_ratio": aligning / tokenising}


# --- a cache, read ---


def _random_cache(folder: Path, n_bytes: int, pair: ModelPair) -> PairedActivationsCache:
    """A cache of the pair's widths, of random rows."""
    d_in = pair.d_a + pair.d_b
    n_rows = n_bytes // (2 * d_in)
    rows = torch.randn(min(n_rows, 4096), d_in)
    return _written(folder, (rows for _ in range(n_rows // len(rows))), pair.d_a, n_rows // 32)


def _written(
    folder: Path, acts: Iterator[Tensor], d_a: int, shard_rows: int, dtype: str = "bfloat16"
) -> PairedActivationsCache:
    first = next(acts)
    models = {"model_a": {"d_model": d_a}, "model_b": {"d_model": first.shape[1] - d_a}}
    header = CacheHeader(models, {}, {}, [], dtype, shard_rows, origins=False)
    writer = CacheWriter(folder, header)

    def rows() -> Iterator[PairedRows]:
        for x in (first, *acts):
            number = torch.arange(len(x))
            yield PairedRows(x, number, number)

    writer.write(rows(), PairCounts())
    write_manifest(folder, header, [writer.progress])
    return PairedActivationsCache(folder)


def _reading(cache: PairedActivationsCache) -> dict[str, float]:
    """An epoch of shuffled batches against the same bytes read in order, from memory and from the disk."""
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
    """Have the files leave the machine's memory, as those of a large cache do by themselves."""
    for shard in cache.shards:
        with (cache.folder / shard.file).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _formats(folder: Path, n_bytes: int, pair: ModelPair) -> dict[str, float]:
    """GB a second at which the same rows are written in each form that was to choose from, the best of three times."""
    rows = torch.randn(n_bytes // (2 * (pair.d_a + pair.d_b)), pair.d_a + pair.d_b)
    rows = rows.to(torch.bfloat16)
    # Arrow knows no bfloat16, and a list of its values would be slower still.
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
    """How uniform the order is in which marked rows come from a cache of four windows."""
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
