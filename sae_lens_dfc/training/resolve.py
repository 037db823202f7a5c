"""Completes a training's settings with the facts of its models and its cache."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from sae_lens_dfc.crosscoders.architectures.dfc import (
    DFCTrainingCrosscoderConfig,
    exclusivity_tests,
)
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.from_cache import with_cache


def resolve(
    cfg: CrosscoderRunnerConfig,
    models: Mapping[str, Mapping[str, Any]],
    cache: PairedActivationsCache | None = None,
) -> CrosscoderRunnerConfig:
    """The same settings, completed with the cache's data and models, the models' hooks and widths,
    and the steps of exclusivity tests.

    Args:
        cfg: Settings whose dtypes are concrete.
        models: `ModelPair.describe()`, or the same from the cache.
        cache: The cache that is read instead of a text.

    Raises:
        ValueError: A width is set that differs from the model's, or the settings name another model
            or other data than the cache was made from.
    """
    if cache is not None:
        cfg = with_cache(cfg, cache)
    first, *others = [_with_widths(sae, cfg, models) for sae in cfg.all_saes]
    return replace(
        cfg,
        sae=first,
        other_saes=others,
        model_a=replace(cfg.model_a, hook_name=models["model_a"]["hook_name"]),
        model_b=replace(cfg.model_b, hook_name=models["model_b"]["hook_name"]),
    )


def _with_widths(
    sae: CrosscoderTrainingConfig,
    cfg: CrosscoderRunnerConfig,
    models: Mapping[str, Mapping[str, Any]],
) -> CrosscoderTrainingConfig:
    widths: dict[str, int] = {}
    for which in ("a", "b"):
        said, model = getattr(sae, f"d_{which}"), models[f"model_{which}"]
        widths[f"d_{which}"] = model["d_model"]
        if said not in (0, model["d_model"]):
            raise ValueError(
                f"sae.d_{which}={said}, but hook {model['hook_name']!r} of model {model['model_name']!r} is "
                f"{model['d_model']} wide. Set d_{which}={model['d_model']}, or leave it out."
            )
    is_tested = cfg.reassign_at and isinstance(sae, DFCTrainingCrosscoderConfig)
    tests = exclusivity_tests(cfg.reassign_at, cfg.training_steps) if is_tested else {}
    # Copied because training writes into the metadata, which two runs of one configuration must not
    # share.
    return replace(sae, d_in=0, metadata=deepcopy(sae.metadata), **widths, **tests)
