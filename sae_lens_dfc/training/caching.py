"""Two models and text in, a cache of their activations out; and a training that reads one."""

import logging
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lens_dfc import ranks
from sae_lens_dfc.cache import CacheWriter, PairedActivationsCache
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.manifest import (
    MANIFEST_FILENAME,
    CacheHeader,
    Progress,
    progress_path,
    write_manifest,
)
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.output import check_output, is_made
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.sources import SourceConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import DataConfig, PairedText, open_pair, require_positive

logger = logging.getLogger(__name__)

# Settings of the data that change no row: of evaluation, or of where the models are.
NOT_IN_HEADER = ("model_a", "model_b", "eval_pairs")
# What a training may choose for itself: it shuffles the rows in an order of its own.
OWN_IN_TRAINING = ("seed",)


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
    """Keep with each row its document, and in each model its token and position: 40 bytes a row."""
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
    pair = pair or open_pair(cfg)
    text = PairedText(cfg, pair, ranks.rank())
    header = cache_header(cfg, pair)
    if not (folder / MANIFEST_FILENAME).is_file():
        _write(text, header, folder, cfg.n_writers)
    cache = PairedActivationsCache(folder)
    difference = header.difference(cache.manifest)
    if difference:
        raise ValueError(
            f"{folder} holds another cache: {difference}. Name another folder, or cache again with --overwrite."
        )
    _check_length(cfg, cache)
    return cache


def _write(text: PairedText, header: CacheHeader, folder: Path, n_writers: int) -> None:
    writer = CacheWriter(folder, header, n_writers, ranks.rank())
    if not writer.progress.done:
        counts = PairCounts()
        rows = text.rows("training", counts, writer.progress.after)
        bar = tqdm(rows, "Caching", unit=" batches", disable=ranks.rank() > 0)
        writer.write(iter(bar), counts)
    ranks.wait()
    if ranks.rank() == 0:
        paths = [progress_path(folder, rank) for rank in range(ranks.world_size())]
        manifest = write_manifest(folder, header, [Progress.load(path)[0] for path in paths])
        for path in paths:
            path.unlink()
        logger.info("%d rows in %d files", manifest["rows"], len(manifest["shards"]))
    ranks.wait()


def cache_header(cfg: CacheConfig, pair: ModelPair) -> CacheHeader:
    """What makes a cache: two with the same header hold the same rows."""
    models = pair.describe()
    for model, described in ((pair.a, models["model_a"]), (pair.b, models["model_b"])):
        described["dtype"] = str(next(model.model.parameters()).dtype).removeprefix("torch.")
        described["chat_template"] = model.tokenizer.chat_template
    configs = {name: asdict(getattr(cfg, name)) for name in ("model_a", "model_b")}
    return CacheHeader(
        models=models,
        configs=configs,
        data={name: value for name, value in _data(cfg).items()},
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
    marks = [MANIFEST_FILENAME, *(path.name for path in folder.glob("progress-*.safetensors"))]
    if not (cfg.resume and is_made(folder, marks)):
        check_output(folder, cfg.overwrite, what="cache", marks=marks)
    if cfg.overwrite and ranks.rank() == 0:
        # Before the new one is whole: there may be no room for both.
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait()


def _check_length(cfg: CacheConfig, cache: PairedActivationsCache) -> None:
    counts = cache.manifest["counts"]
    n = sum(counts[name] for name in ("pairs", "first_position", "outlier", "not_finite"))
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
    for name, made in cache.manifest["data"].items():
        if name in OWN_IN_TRAINING:
            continue
        if given[name] not in (default[name], made):
            raise ValueError(
                f"{name}={given[name]!r} is asked for, and the cache in {cache.folder} was made with {made!r}. Leave "
                "it out, or make a cache with it."
            )
        taken[name] = made
    taken["sources"] = [SourceConfig(**source) for source in taken["sources"]]
    configs = {name: ModelConfig(**c) for name, c in cache.manifest["configs"].items()}
    return replace(cfg, **taken, **configs)


def _check_model(which: str, asked: ModelConfig, cache: PairedActivationsCache) -> None:
    made = cache.models[which]
    path = Path(asked.model_name)
    name = path.name if path.exists() else asked.model_name
    for setting, wanted, there in (
        ("model_name", name, made["model_name"]),
        ("hook_name", asked.hook_name, made["hook_name"]),
        ("revision", asked.revision, made["revision"]),
    ):
        if wanted and wanted != there:
            raise ValueError(
                f"{which}.{setting}={wanted!r} is asked for, and the cache in {cache.folder} is of {there!r}. Leave it "
                "out, or make a cache of that model."
            )
