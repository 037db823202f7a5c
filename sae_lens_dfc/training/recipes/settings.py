"""Builds the settings of a training from a recipe."""

from collections.abc import Collection
from typing import Any

from sae_lens.registry import get_sae_training_class

from sae_lens_dfc.core.schema import flattened, merge
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.recipes.named import find_recipe


def recipe_settings(name: str, given: Collection[str]) -> dict[str, Any]:
    """A recipe's settings, checked against the settings that the caller gives; `dataset_path`
    replaces its sources.

    Args:
        name: As `find_recipe` takes it.
        given: Dotted names of the settings that the caller gives.

    Raises:
        ValueError: There is no such recipe, or it needs a setting that is not given.
    """
    recipe = find_recipe(name)
    # A single data set satisfies `sources`.
    given = {*given, "sources"} if "dataset_path" in given else given
    needed = {key: why for key, why in recipe.required.items() if key not in given}
    if needed:
        reasons = "; ".join(f"{key} ({why})" for key, why in needed.items())
        raise ValueError(f"Recipe {name!r} needs {reasons}.")
    settings = dict(recipe.settings)
    if "dataset_path" in given:
        settings.pop("sources", None)
    return settings


def recipe_config(name: str, **settings: Any) -> CrosscoderRunnerConfig:
    """The runner configuration of a recipe.

    Args:
        name: As `find_recipe` takes it.
        settings: Settings that the recipe requires, and overrides; `sae`, `model_a` and `model_b`
            are mappings, whose other entries keep the recipe's values.

    Raises:
        ValueError: There is no such recipe, or a required setting is missing.

    >>> cfg = recipe_config(
    ...     "llama3.1-8b-vs-qwen3-8b",
    ...     model_a={"hook_name": "blocks.16.hook_resid_post"},
    ...     model_b={"hook_name": "blocks.18.hook_resid_post"},
    ... )
    >>> cfg.sae.k, cfg.sae.n_a_exclusive, cfg.model_b.model_name, cfg.sources[1].dataset_path
    (200, 6553, 'Qwen/Qwen3-8B', 'lmsys/lmsys-chat-1m')
    """
    merged = merge(recipe_settings(name, flattened(settings)), settings)
    sae_class = get_sae_training_class(merged.pop("architecture"))[1]
    parts = {
        "sae": sae_class(**merged.pop("sae", {})),
        "model_a": ModelConfig(**merged.pop("model_a", {})),
        "model_b": ModelConfig(**merged.pop("model_b", {})),
        "sources": [SourceConfig(**source) for source in merged.pop("sources", [])],
    }
    return CrosscoderRunnerConfig(**parts, **merged)
