"""Two models and text in, a cache of their activations out; and a training that reads one."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sae_lens.util import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_dfc import ranks
from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.cache import PairedActivationsCache, is_manifest
from sae_lens_dfc.cache_writer import CacheWriter
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.files import check_types, from_plain
from sae_lens_dfc.manifest import (
    MANIFEST_FILENAME,
    CacheHeader,
    Progress,
    progress_path,
    write_manifest,
)
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.output import check_output, sole_user
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.sources import SourceConfig
from sae_lens_dfc.stopping import interruptible
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import DataConfig, PairedText, open_pair, require_positive

logger = logging.getLogger(__name__)

# Settings of the data that change no row: of evaluation, or of where the models are.
NOT_IN_HEADER = ("model_a", "model_b", "eval_pairs")
# What a training may choose for itself: it shuffles the rows in an order of its own.
OWN_IN_TRAINING = ("seed",)
OWN_FILES = (
    *("rows-*.safetensors", ".rows-*.new", "progress-*.safetensors", ".progress-*.new"),
    f".{MANIFEST_FILENAME}.new",
)


@dataclass(kw_only=True)
class CacheConfig(DataConfig):
    """Settings of `cache_activations`."""

    cache_path: str = "runs/cache"
    """Folder for the cache."""
    cache_dtype: str = "bfloat16"
    """Number format of the rows: bfloat16, float16 or float32."""
    shard_rows: int = 16_384
    """Rows in a file."""
    n_writers: int = 2
    """Threads that write while the models run."""
    save_origins: bool = False
    """Keep with each row its source and document, and in each model its token and position: 48 bytes a row."""
    overwrite: bool = False
    """Replace the cache that the folder holds."""
    resume: bool = False
    """Go on at the last whole file of a cache that was stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, ("shard_rows", "n_writers"))
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume contradict each other. Choose one.")


def cache_activations(cfg: CacheConfig, pair: ModelPair | None = None) -> PairedActivationsCache:
    """Run both models over the training text once, and keep their activations.

    Args:
        cfg: What to read and where to write.
        pair: Models already loaded, in place of those `cfg` names.

    Raises:
        ValueError: The folder holds another cache, settings, models and text do not fit, or the text ended before
            `training_pairs`: then the cache is whole and can be used all the same.
        OSError: The rows could not be written; those written before are kept.
    """
    folder = Path(cfg.cache_path)
    _check_folder(folder, cfg)
    with sole_user(folder) if ranks.rank() == 0 else nullcontext():
        return _cached(cfg, folder, pair or open_pair(cfg))


def _cached(cfg: CacheConfig, folder: Path, pair: ModelPair) -> PairedActivationsCache:
    # While this one came here, another process may have ended with it.
    _check_folder(folder, cfg)
    text = PairedText(cfg, pair, ranks.rank())
    header = cache_header(cfg, pair, text)
    if cfg.overwrite:
        # Not before all is known to fit, and not after the new one is whole: there may be no room for both.
        _remove(folder)
    if not (folder / MANIFEST_FILENAME).is_file():
        _write(text, header, folder, cfg)
    cache = PairedActivationsCache(folder)
    ranks.wait()
    if ranks.rank() == 0:
        # Left by a process that was killed on the way.
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
    writer = CacheWriter(folder, header, cfg.n_writers, ranks.rank())
    ranks.wait()
    _check_space(folder, header, cfg, writer.progress.rows)
    if not writer.progress.done:
        counts = PairCounts()
        n_pairs = text.stream("training").n_pairs
        with interruptible(text.rows("training", counts, writer.progress.after)) as rows:
            writer.write(_with_bar(rows, n_pairs, writer.progress.rows), counts)
    ranks.wait()
    if ranks.rank() == 0:
        paths = [progress_path(folder, rank) for rank in range(ranks.world_size())]
        parts = [Progress.load(path)[0] for path in paths]
        if sum(part.rows for part in parts) == 0:
            raise ValueError(
                "The text has no paired position: there is nothing to cache. Check the text and the tokenizers with "
                "`sae-lens-dfc align`."
            )
        manifest = write_manifest(folder, header, parts)
        for path in paths:
            path.unlink()
        logger.info("%d rows in %d files", manifest["rows"], len(manifest["shards"]))
    ranks.wait()


def _with_bar(rows: Iterator[PairedRows], n_pairs: int | None, n_done: int) -> Iterator[PairedRows]:
    with tqdm(
        desc="Caching", total=n_pairs, initial=n_done, unit=" rows", disable=ranks.rank() > 0
    ) as bar:
        for batch in rows:
            yield batch
            bar.update(len(batch.acts))


def _check_space(folder: Path, header: CacheHeader, cfg: CacheConfig, n_done: int) -> None:
    if cfg.training_pairs is None or ranks.rank() > 0:
        return
    of_row = str_to_dtype(header.dtype).itemsize * (header.d_a + header.d_b) + 48 * header.origins
    needed = of_row * (cfg.training_pairs // cfg.n_ranks - n_done) * cfg.n_ranks
    here = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free, format_sizeof = shutil.disk_usage(here).free, tqdm.format_sizeof
    if needed > free:
        raise ValueError(
            f"{cfg.training_pairs:,} pairs take {format_sizeof(needed, 'B')}, and {folder} has {format_sizeof(free, 'B')} free. Make "
            "room, lower training_pairs, or name another cache_path."
        )


def cache_header(cfg: CacheConfig, pair: ModelPair, text: PairedText) -> CacheHeader:
    """What makes a cache: two with the same header hold the same rows."""
    models = pair.describe()
    for model, described in ((pair.a, models["model_a"]), (pair.b, models["model_b"])):
        described["dtype"] = str(next(model.model.parameters()).dtype).removeprefix("torch.")
        described["chat_template"] = model.tokenizer.chat_template
    configs = {name: asdict(getattr(cfg, name)) for name in ("model_a", "model_b")}
    return CacheHeader(
        models=models,
        configs=configs,
        data=_data(cfg),
        text=[source.fingerprint for source in text.sources] if ranks.world_size() == 1 else [],
        dtype=cfg.cache_dtype,
        shard_rows=cfg.shard_rows,
        origins=cfg.save_origins,
    )


def _data(cfg: DataConfig) -> dict[str, Any]:
    """The settings of the data, as plain values."""
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
            f"Output folder {folder} already holds a cache. Pass --resume to go on with it, --overwrite to make it anew, "
            "or name another."
        )


def _files(folder: Path) -> list[Path]:
    """The files of a cache in this folder."""
    files = [path for pattern in OWN_FILES for path in folder.glob(pattern)]
    manifest = folder / MANIFEST_FILENAME
    return [*files, manifest] if manifest.is_file() and (files or is_manifest(manifest)) else files


def _remove(folder: Path) -> None:
    ranks.wait()
    if ranks.rank() == 0:
        # The manifest first: what is left when this is stopped must not pass for a cache.
        for path in reversed(_files(folder)):
            path.unlink()
    ranks.wait()


def _check_length(cfg: CacheConfig, cache: PairedActivationsCache) -> None:
    counts = cache.counts
    n = counts.pairs + counts.first_position + counts.outlier + counts.not_finite
    if cfg.training_pairs is not None and n < cfg.training_pairs:
        raise ValueError(
            f"The text ended after {n} of the {cfg.training_pairs} pairs asked for (training_pairs). The cache in "
            f"{cfg.cache_path} holds all of it, {len(cache)} rows, and can be used as it is; for more give more text."
        )


def with_cache(
    cfg: CrosscoderRunnerConfig, cache: PairedActivationsCache
) -> CrosscoderRunnerConfig:
    """The settings of a training on a cache: what made the cache is taken over, for evaluation to go by.

    Raises:
        ValueError: Another model or other data is asked for than the cache was made of.
    """
    for which in ("model_a", "model_b"):
        _check_model(which, getattr(cfg, which), cache)
    taken: dict[str, Any] = {}
    given, default = _data(cfg), _data(DataConfig())
    made_of = cache.manifest["data"]
    # Of the types that the settings have: a cache may be somebody else's.
    check_types(DataConfig, {**made_of, "sources": []}, f"The cache in {cache.folder}")
    if not isinstance(made_of.get("sources", []), list):
        raise ValueError(f"The cache in {cache.folder} has no list as sources.")
    for name, made in made_of.items():
        if name in OWN_IN_TRAINING:
            continue
        if name not in given:
            raise ValueError(
                f"The cache in {cache.folder} was made with a setting that this version does not know: {name!r:.80}."
            )
        if name != "n_ranks" and given[name] not in (default[name], made):
            raise ValueError(
                f"{name}={given[name]!r} is asked for, and the cache in {cache.folder} was made with {made!r}. Leave "
                "it out, or make a cache with it."
            )
        if given[name] != made:
            logger.info("As the cache was made: %s=%r, not %r", name, made, given[name])
        taken[name] = made
    taken["sources"] = [
        from_plain(SourceConfig, source, "A source of the cache")
        for source in taken.get("sources", [])
    ]
    configs = {name: _config_of(cache, name) for name in ("model_a", "model_b")}
    return replace(cfg, **taken, **configs)


def _config_of(cache: PairedActivationsCache, which: str) -> ModelConfig:
    return from_plain(ModelConfig, cache.manifest["configs"].get(which), f"The cache's {which}")


def _check_model(which: str, asked: ModelConfig, cache: PairedActivationsCache) -> None:
    made, config = cache.models[which], _config_of(cache, which)
    if not all(isinstance(made.get(name), str) for name in ("model_name", "hook_name")):
        raise ValueError(
            f"The cache in {cache.folder} does not say what its {which} is called, or where it was read."
        )
    path, was_at = Path(asked.model_name), Path(config.model_name)
    name = path.name if path.exists() else asked.model_name
    if asked.model_name and path.exists() and was_at.exists() and not path.samefile(was_at):
        name = (
            asked.model_name
        )  # a folder of the same name, elsewhere, while the cache's is still there
    wanted: dict[str, tuple[Any, Any]] = {
        "model_name": (name, made["model_name"]),
        "hook_name": (asked.hook_name, made["hook_name"]),
    }
    for setting in ("revision", "dtype", "prepend_bos", "chat_template", "model_class_name"):
        is_default = getattr(asked, setting) == getattr(ModelConfig(), setting)
        wanted[setting] = (
            None if is_default else getattr(asked, setting),
            getattr(config, setting),
        )
    for setting, (now, there) in wanted.items():
        if now and now != there:
            raise ValueError(
                f"{which}.{setting}={now!r} is asked for, and the cache in {cache.folder} is of {there!r}. Leave it "
                "out, or make a cache of that model."
            )
