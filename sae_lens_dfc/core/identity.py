"""Decides whether two trainings, or two caches, are the same, by the settings that affect a batch
or a weight and by fingerprints of their inputs.

All other settings may change when a training or a cache is resumed. A setting that this module does
not name must stay the same.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

TEXT_LOCATION = ("dataset_path", "dataset_name", "dataset_split", "text_column", "streaming")
"""Settings that locate a data set."""
OF_RUN = {
    # Output and logging.
    *("resume", "overwrite", "output_path", "checkpoint_path", "n_checkpoints", "logger"),
    # Speed and evaluation.
    *("prefetch_llm_batches", "n_writers", "eval_pairs"),
    # Device: another GPU gives the same numbers, but another kind of device rounds differently.
    "device",
    # Locations of the text and the cache, whose fingerprints are compared instead.
    *TEXT_LOCATION,
    "cache_path",
    # It becomes the crosscoders' own reassign_steps and evidence_window.
    "reassign_at",
}
"""Settings of a training or a cache that may change."""
OF_SOURCE = {
    *TEXT_LOCATION,
    # It only decides when to raise an error.
    "max_unreadable",
}
"""Settings of a data set that may change."""
MODEL_SETTINGS = {
    *("device", "drop_unused_layers"),
    # `HookedModel.describe` is compared instead, and the chat template is part of the text's
    # fingerprint if the text is chats.
    *("model_name", "revision", "hook_name", "model_class_name", "prepend_bos", "chat_template"),
    *("base", "base_revision", "adapter_subfolder"),
    # The dtype is compared.
    "dtype_was_auto",
}
"""Settings of a model that may change."""
CROSSCODER_SETTINGS = {"device", "metadata"}
"""Settings of a crosscoder that may change."""
PROVENANCE = {
    *("model_name", "revision"),
    *("adapter", "adapter_revision", "adapter_sha256", "base", "base_revision"),
}
"""Parts of a model's description that only record where it came from; its fingerprints identify the
model."""
ONLY_WITH = {
    "llm_compilation_mode": "compile_llm",
    "sae_compilation_mode": "compile_sae",
    "cache_window_shards": "cache_path",
}
"""Settings that only have an effect if another one is set."""
UNUSED_WITH_CACHE = {"n_batches_in_buffer", "activations_mixing_fraction", "keep_in_memory"}
"""Settings that only have an effect if the models run."""
DEVICES = ("device", "model_a.device", "model_b.device")


def deciding(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that decide which rows a cache holds, or what is trained.

    Args:
        cfg: Settings of a cache or a training as plain values; values of an unexpected form are
            left unchanged.
    """
    idle = {name for name, other in ONLY_WITH.items() if not cfg.get(other)}
    if cfg.get("cache_path"):
        idle |= UNUSED_WITH_CACHE
    kept = _without(cfg, OF_RUN | idle)
    sources = cfg.get("sources") or [{"weight": 1.0, "tokenizer": "a"}]
    kept["sources"] = _each_without(sources, OF_SOURCE)
    kept["other_saes"] = _each_without(cfg.get("other_saes"), CROSSCODER_SETTINGS)
    kept["sae"] = _without(cfg.get("sae"), CROSSCODER_SETTINGS)
    for model in ("model_a", "model_b"):
        kept[model] = _without(cfg.get(model), MODEL_SETTINGS)
    return kept


def same_wherever(models: Any) -> Any:
    """Remove from the descriptions of two models where they came from."""
    if not isinstance(models, Mapping):
        return models
    return {name: _without(model, PROVENANCE) for name, model in models.items()}


def other_devices(was: Any, now: Any) -> str:
    """List the settings whose kind of device changed, with the old and new device; empty if none
    did.

    >>> other_devices({"device": "cuda:1"}, {"device": "cuda:0"})
    ''
    >>> other_devices({"device": "cpu"}, {"device": "cuda:0"})
    'device was cpu and is cuda:0'
    """
    found: list[str] = []
    for setting in DEVICES:
        before, after = (_inside(cfg, setting.split(".")) for cfg in (was, now))
        if before.partition(":")[0] != after.partition(":")[0]:
            found.append(f"{setting} was {before} and is {after}")
    return ", ".join(found)


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> str | None:
    """Name the first setting in which two nested mappings differ, with both values; none if they
    are equal as JSON.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    'a.b was 1 and is 2'
    """
    one, other = json.loads(json.dumps([one, other]))
    for key in [*one, *(key for key in other if key not in one)]:
        was, now = one.get(key), other.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found = first_difference(was, now, f"{prefix}{key}.")
            if found:
                return found
        elif was != now:
            return f"{prefix}{key} was {was!r} and is {now!r}"
    return None


def _inside(values: Any, path: Collection[str]) -> str:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return str(values)


def _without(values: Any, names: Collection[str]) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {name: value for name, value in values.items() if name not in names}


def _each_without(values: Any, names: Collection[str]) -> Any:
    return [_without(one, names) for one in values] if isinstance(values, list) else values
