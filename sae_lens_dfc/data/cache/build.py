"""Runs two models over their text and writes their activations to a cache."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sae_lens.util import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.identity import other_devices
from sae_lens_dfc.core.interrupts import interruptible
from sae_lens_dfc.core.machine import free_disk
from sae_lens_dfc.core.output_folder import check_output, file_lock
from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.tensor_files import load_values
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.cache.manifest import (
    MANIFEST_FILENAME,
    CacheHeader,
    WriterProgress,
    progress_path,
    write_manifest,
)
from sae_lens_dfc.data.cache.reader import PairedActivationsCache, is_manifest
from sae_lens_dfc.data.cache.writer import CacheWriter
from sae_lens_dfc.data.config import CacheConfig, DataConfig
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText, chosen_formats, open_pair, with_models_settled
from sae_lens_dfc.models.number_formats import say_kept

logger = logging.getLogger(__name__)

# Settings that change no row: those of evaluation, and the models' locations.
NOT_IN_HEADER = ("model_a", "model_b", "eval_pairs")
OWN_FILES = (
    *("rows-*.safetensors", ".rows-*.new", "progress-*.safetensors", ".progress-*.new"),
    f".{MANIFEST_FILENAME}.new",
)


def cache_activations(cfg: CacheConfig, pair: ModelPair | None = None) -> PairedActivationsCache:
    """Run both models over the training text once and cache their activations.

    Args:
        cfg: Settings of the text, the models and the cache.
        pair: Models already loaded, instead of those that `cfg` names.

    Raises:
        ValueError: The folder holds another cache; settings, models and text do not fit; or the
            text ended before `max_unique_pairs` (the cache is then complete and usable).
        OSError: Rows could not be written; those written before are kept.
    """
    folder = Path(cfg.cache_path)
    cfg = with_models_settled(cfg, _begun(folder) if cfg.resume else None)
    if cfg.resume:
        say_kept("The cache", chosen_formats(cfg))
    _check_folder(folder, cfg)
    with file_lock(folder) if distributed.rank() == 0 else nullcontext():
        return _cached(cfg, folder, pair or open_pair(cfg))


def _begun(folder: Path) -> Any:
    """The models' settings that an existing cache records; None if they cannot be read, which
    raises an error later."""
    manifest = folder / MANIFEST_FILENAME
    try:
        if manifest.is_file():
            header: Any = read_object(manifest)
        else:
            header = load_values(progress_path(folder, distributed.rank())).get("header")
    except (OSError, ValueError):
        return None
    return header.get("configs") if isinstance(header, Mapping) else None


def _cached(cfg: CacheConfig, folder: Path, pair: ModelPair) -> PairedActivationsCache:
    # Another process may have written the cache before this one got the lock.
    _check_folder(folder, cfg)
    text = PairedText(cfg, pair, distributed.rank())
    header = cache_header(cfg, pair, text)
    if cfg.overwrite:
        # Only once everything is known to fit, but before the new cache is written: both may not
        # fit on the disk.
        _remove(folder)
    if not (folder / MANIFEST_FILENAME).is_file():
        _write(text, header, folder, cfg)
    cache = PairedActivationsCache(folder)
    distributed.wait()
    if distributed.rank() == 0:
        # Left by a process that was killed.
        for left in (*folder.glob("progress-*.safetensors"), *folder.glob(".*.new")):
            left.unlink()
    difference = header.difference(cache.manifest)
    if difference:
        raise ValueError(
            f"{folder} holds another cache: {difference}. Name another folder, or cache again with --overwrite."
        )
    _check_length(cfg, cache)
    return cache


def _write(text: PairedText, header: CacheHeader, folder: Path, cfg: CacheConfig) -> None:
    writer = CacheWriter(folder, header, cfg.n_writers, distributed.rank())
    distributed.wait()
    if devices := other_devices(writer.begun_with.get("configs"), header.configs):
        logger.warning(
            "The cache is resumed on another kind of device, which rounds differently: %s. Its bytes will not be reproducible",
            devices,
        )
    _check_space(folder, header, cfg, writer.progress.rows)
    if not writer.progress.done:
        counts = PairCounts()
        n_pairs = text.stream("training").n_pairs
        with interruptible(text.rows("training", counts, writer.progress.after)) as rows:
            writer.write(_with_bar(rows, n_pairs, writer.progress.rows), counts)
    distributed.wait()
    if distributed.rank() == 0:
        paths = [progress_path(folder, rank) for rank in range(distributed.world_size())]
        parts = [WriterProgress.load(path)[0] for path in paths]
        if sum(part.rows for part in parts) == 0:
            raise ValueError(
                "The text has no paired position, so there is nothing to cache. Check the text and the tokenizers with "
                "`sae-lens-dfc align`."
            )
        manifest = write_manifest(folder, header, parts)
        for path in paths:
            path.unlink()
        logger.info("%d rows in %d files", manifest["rows"], len(manifest["shards"]))
    distributed.wait()


def _with_bar(rows: Iterator[PairedRows], n_pairs: int | None, n_done: int) -> Iterator[PairedRows]:
    with tqdm(
        desc="Caching", total=n_pairs, initial=n_done, unit=" rows", disable=distributed.rank() > 0
    ) as bar:
        for batch in rows:
            yield batch
            bar.update(len(batch.acts))


def _check_space(folder: Path, header: CacheHeader, cfg: CacheConfig, n_done: int) -> None:
    if cfg.max_unique_pairs is None or distributed.rank() > 0:
        return
    of_row = str_to_dtype(header.dtype).itemsize * (header.d_a + header.d_b) + 48 * header.origins
    needed = of_row * (cfg.max_unique_pairs // cfg.n_ranks - n_done) * cfg.n_ranks
    free, format_sizeof = free_disk(folder), tqdm.format_sizeof
    if needed > free:
        raise ValueError(
            f"{cfg.max_unique_pairs:,} pairs take {format_sizeof(needed, 'B')}, and {folder} has {format_sizeof(free, 'B')} free. Make "
            "room, lower max_unique_pairs, or name another cache_path."
        )


def cache_header(cfg: CacheConfig, pair: ModelPair, text: PairedText) -> CacheHeader:
    """The settings and fingerprints that determine a cache: caches with the same header hold the
    same rows."""
    models = pair.describe()
    for model, described in ((pair.a, models["model_a"]), (pair.b, models["model_b"])):
        described["dtype"] = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    configs = {name: asdict(getattr(cfg, name)) for name in ("model_a", "model_b")}
    return CacheHeader(
        models=models,
        configs=configs,
        data=data_settings(cfg),
        text=text.fingerprint,
        dtype=cfg.cache_dtype,
        shard_rows=cfg.shard_rows,
        origins=cfg.save_origins,
    )


def data_settings(cfg: DataConfig) -> dict[str, Any]:
    """The data settings as plain values."""
    values = {f.name: getattr(cfg, f.name) for f in fields(DataConfig)}
    values["sources"] = [asdict(source) for source in cfg.sources]
    return {name: value for name, value in values.items() if name not in NOT_IN_HEADER}


def _check_folder(folder: Path, cfg: CacheConfig) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        check_output(folder, cfg.overwrite)
        return
    foreign = {path.name for path in folder.iterdir()} - {path.name for path in _files(folder)}
    if foreign:
        raise ValueError(
            f"Output folder {folder} holds files that are not a cache: {', '.join(sorted(foreign)[:3])}. Name another."
        )
    if not cfg.overwrite and not cfg.resume:
        raise ValueError(
            f"Output folder {folder} already holds a cache. Pass --resume to resume it, --overwrite to replace it, "
            "or name another."
        )


def _files(folder: Path) -> list[Path]:
    """The cache files in a folder."""
    files = [path for pattern in OWN_FILES for path in folder.glob(pattern)]
    manifest = folder / MANIFEST_FILENAME
    return [*files, manifest] if manifest.is_file() and (files or is_manifest(manifest)) else files


def _remove(folder: Path) -> None:
    distributed.wait()
    if distributed.rank() == 0:
        # The manifest first: if this is interrupted, the rest must not look like a complete cache.
        for path in reversed(_files(folder)):
            path.unlink()
    distributed.wait()


def _check_length(cfg: CacheConfig, cache: PairedActivationsCache) -> None:
    counts = cache.counts
    n = counts.pairs + counts.first_position + counts.outlier + counts.not_finite
    if cfg.max_unique_pairs is not None and n < cfg.max_unique_pairs:
        raise ValueError(
            f"The text ended after {n} of the {cfg.max_unique_pairs} pairs asked for (max_unique_pairs). The cache in "
            f"{cfg.cache_path} holds all {len(cache)} rows and can be used as it is; for more rows, give more text."
        )
