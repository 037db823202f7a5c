"""Resolves `auto` dtypes when a training starts or is resumed: a resumed one keeps the dtypes it
started with, even on another device."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.paired_text import chosen_formats, with_models_settled
from sae_lens_dfc.models.config import AUTO
from sae_lens_dfc.models.number_formats import say_kept
from sae_lens_dfc.training.checkpoint import checkpoints, settings_in
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


def with_formats_settled(
    cfg: CrosscoderRunnerConfig, cache: PairedActivationsCache | None
) -> CrosscoderRunnerConfig:
    """The same settings with model A filled in and `auto` dtypes resolved.

    A resumed training keeps the dtypes it started with; the log reports where `auto` would choose
    others on this device.

    Args:
        cfg: The settings.
        cache: Cache to train on, if any; the models then have the dtypes it was made with.

    Raises:
        ValueError: A device is not available, or an adapter cannot be read.
    """
    begun = _begun(cfg) if cfg.resume else {}
    settled = with_models_settled(cfg, begun if cache is None else cache.manifest["configs"])
    kept = chosen_formats(settled) if cache is None else []
    if cfg.autocast == AUTO:
        autocast = begun.get("autocast")
        autocast = autocast if isinstance(autocast, bool) else cfg.is_autocast
        settled = replace(settled, autocast=autocast)
        kept.append(("bfloat16" if autocast else "float32", cfg.device))
    if cfg.resume:
        say_kept("The training", kept)
    return settled


def _begun(cfg: CrosscoderRunnerConfig) -> Mapping[str, Any]:
    """The settings recorded by the training to resume; empty if they cannot be read, which is
    reported later."""
    readers = [_of_output, _of_checkpoint]
    # With --overwrite, the output folder may hold another run.
    for read in reversed(readers) if cfg.overwrite else readers:
        try:
            begun = read(cfg)
        except (OSError, ValueError):
            continue
        if isinstance(begun, Mapping):
            return begun
    return {}


def _of_output(cfg: CrosscoderRunnerConfig) -> Any:
    return (
        None if cfg.output_path is None else read_object(Path(cfg.output_path, RUNNER_CFG_FILENAME))
    )


def _of_checkpoint(cfg: CrosscoderRunnerConfig) -> Any:
    found = [] if cfg.checkpoint_path is None else checkpoints(Path(cfg.checkpoint_path))
    return settings_in(found[-1]) if found else None
