"""Completes a training's settings from the cache that it reads."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_lens_dfc.core.identity import TEXT_LOCATION, deciding
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.data.cache.build import data_settings
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.config import DataConfig
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)


# Settings that a training may change: it shuffles the rows with its own seed.
OWN_IN_TRAINING = ("seed",)
TEXT = (*TEXT_LOCATION, "sources")


def with_cache(
    cfg: CrosscoderRunnerConfig, cache: PairedActivationsCache
) -> CrosscoderRunnerConfig:
    """The settings of a training on a cache, with the models and data that the cache was made from,
    which evaluation needs.

    Raises:
        ValueError: The settings name another model or other data than the cache was made from.
    """
    for which in ("model_a", "model_b"):
        _check_model(which, getattr(cfg, which), cache)
    taken: dict[str, Any] = {}
    given, default = data_settings(cfg), data_settings(DataConfig())
    made_of = cache.manifest["data"]
    made_with = from_plain(DataConfig, made_of, f"The cache in {cache.folder}", extra="ignore")
    own = {*OWN_IN_TRAINING, *(TEXT if _has_moved(cfg, cache) else ())}
    for name, made in made_of.items():
        if name in own:
            continue
        if name not in given:
            raise ValueError(
                f"The cache in {cache.folder} was made with a setting that is unknown to this version: {name!r:.80}."
            )
        if name != "n_ranks" and given[name] not in (default[name], made):
            raise ValueError(
                f"{name}={given[name]!r} is set, but the cache in {cache.folder} was made with {made!r}. Leave "
                "it out, or make a cache with it."
            )
        if given[name] != made:
            logger.info("Using the cache's setting: %s=%r, not %r", name, made, given[name])
        taken[name] = made
    if "sources" not in own:
        taken["sources"] = made_with.sources
    configs = {name: _config_of(cache, name) for name in ("model_a", "model_b")}
    return replace(cfg, **taken, **configs)


def _has_moved(cfg: DataConfig, cache: PairedActivationsCache) -> bool:
    """Whether the requested text is the cache's text at another path."""
    made_of = cache.manifest["data"]
    place = {name: made_of[name] for name in TEXT if name in made_of}
    made = from_plain(DataConfig, place, f"The cache in {cache.folder}").all_sources
    asked = cfg.all_sources
    if asked in (made, DataConfig().all_sources):
        return False
    of_all = [deciding({"sources": [asdict(source) for source in one]}) for one in (asked, made)]
    if of_all[0] != of_all[1]:
        return False
    try:
        signs = {f"source_{i}": Source.open(one).fingerprint for i, one in enumerate(asked)}
    except ValueError:
        return False
    text = cache.manifest.get("text")
    return isinstance(text, dict) and all(text.get(name) == sign for name, sign in signs.items())


def _config_of(cache: PairedActivationsCache, which: str) -> ModelConfig:
    return from_plain(ModelConfig, cache.manifest["configs"].get(which), f"The cache's {which}")


def _check_model(which: str, asked: ModelConfig, cache: PairedActivationsCache) -> None:
    made, config = cache.models[which], _config_of(cache, which)
    if not all(isinstance(made.get(name), str) for name in ("model_name", "hook_name")):
        raise ValueError(
            f"The cache in {cache.folder} does not record the name of its {which} or its hook."
        )
    path, was_at = Path(asked.model_name), Path(config.model_name)
    name = path.name if path.exists() else asked.model_name
    if asked.model_name and path.exists() and was_at.exists() and not path.samefile(was_at):
        name = asked.model_name  # another folder of the same name
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
                f"{which}.{setting}={now!r} is set, but the cache in {cache.folder} was made with {there!r}. Leave it "
                "out, or make a cache of that model."
            )
