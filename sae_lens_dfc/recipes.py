"""Settings by name: the papers' own runs, and ours that did best in the benchmark.

A recipe is a mapping of settings as `sae-lens-dfc train --config` takes them. Where a run was and on
what text is asked for when a paper does not print it. Where a paper is silent on the rest, our defaults
stand: the length of a context, Adam's decay rates, no decay of lr; for the Delta-Crosscoder also the
inputs' normalisation, the decoder's first norm, warm-up and the window of dead latents. The site in
the residual stream is taken to be a block's output.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens.registry import get_sae_training_class

from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.sources import SourceConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

TEST_AT = (0.8, 0.95)
"""Shares of the training after which `dfc-tested` tests its exclusive latents (benchmarks/README.md)."""


@dataclass(frozen=True)
class Recipe:
    """Settings with their source.

    Args:
        summary: What it trains and where the settings come from, one line.
        settings: Nested settings; `architecture` names the crosscoder.
        required: What the source does not say: dotted names of settings that the caller must give, and why.
    """

    summary: str
    settings: Mapping[str, Any]
    required: Mapping[str, str] = field(default_factory=dict)


_DFC_PAPER: dict[str, Any] = {
    "architecture": "dfc",
    "sae": {
        "d_sae": 131_072,
        "k": 200,
        "k_initial": 1000,
        "k_anneal_steps": 5_000,
        "a_exclusive_fraction": 0.05,
        "b_exclusive_fraction": 0.05,
        "aux_loss_coefficient": 0.03,
        # Table 3 has (4096 + 2880) / 4 = 1744 for the second pair, which is the default; the text says 512.
        "k_aux": None,
        "decoder_init_norm": 0.4,
        "normalization": "median_norm",
        "decoder_norm": "sum",
    },
    # Which parts of them, the paper does not say.
    "sources": [
        {"dataset_path": "HuggingFaceFW/fineweb", "weight": 0.5},
        {"dataset_path": "lmsys/lmsys-chat-1m", "weight": 0.5, "text_column": "conversation"},
    ],
    "training_pairs": 100_000_000,
    "training_tokens": 204_800_000,
    "train_batch_size_tokens": 2048,
    "lr": 1e-4,
    "lr_warm_up_steps": 1000,
    # Dead after 10,000,000 tokens without firing.
    "dead_feature_window": 4882,
    "autocast": True,
}

RECIPES: dict[str, Recipe] = {
    "dfc-tested": Recipe(
        "A DFC whose exclusive latents are tested twice, late in training; sizes, k and lr stay yours (benchmarks/README.md)",
        {
            "architecture": "dfc",
            "sae": {"decoder_norm": "sum"},
            "test_at": list(TEST_AT),
        },
        {"sae.d_sae": "number of latents: as many as the text can train"},
    ),
    "llama3.1-8b-vs-qwen3-8b": Recipe(
        "DFC, 131,072 latents, between two chat models (arXiv 2602.11729, table 2)",
        {
            **_DFC_PAPER,
            "model_a": {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "dtype": "bfloat16"},
            "model_b": {"model_name": "Qwen/Qwen3-8B", "dtype": "bfloat16"},
        },
        {
            "model_a.hook_name": "the paper says 'middle layers' and prints no index",
            "model_b.hook_name": "the paper says 'middle layers' and prints no index",
        },
    ),
    "gpt-oss-20b-vs-deepseek-r1-qwen3-8b": Recipe(
        "DFC, 131,072 latents, between two reasoning models (arXiv 2602.11729, table 3; there too DeepSeek is A)",
        {
            **_DFC_PAPER,
            "model_a": {
                "model_name": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
                "hook_name": "blocks.16.hook_resid_post",
                "dtype": "bfloat16",
            },
            "model_b": {
                "model_name": "openai/gpt-oss-20b",
                "hook_name": "blocks.12.hook_resid_post",
                "dtype": "bfloat16",
            },
        },
    ),
    "delta-narrow-finetune": Recipe(
        "Delta-Crosscoder between a model and its narrow fine-tune, expansion factor 5 (arXiv 2603.04426, its Qwen2.5-7B runs)",
        {
            "architecture": "delta_crosscoder",
            "sae": {
                "d_sae": 17_920,
                "k": 600,
                "shared_fraction": 0.2,
                "k_shared_ratio": 2.0,
                "delta_loss_coefficient": 0.005,
                "aux_loss_coefficient": 1 / 32,
            },
            "model_a": {"dtype": "bfloat16"},
            "model_b": {"dtype": "bfloat16"},
            "context_size": 1024,
            "training_tokens": 204_800_000,
            "train_batch_size_tokens": 4096,
            "lr": 1e-4,
            "autocast": True,
        },
        {
            "model_a.model_name": "the base model",
            "model_b.model_name": "its fine-tune",
            "model_a.hook_name": "the paper takes one middle layer and its index is not public",
            "model_b.hook_name": "the same layer",
            "sources": "web text, chat, and both models' answers to the same prompts (sae-lens-dfc generate)",
        },
    ),
}


def recipe_settings(name: str, given: Collection[str]) -> dict[str, Any]:
    """A recipe's settings by its name, for a caller who gives these besides; one data set takes its sources' place.

    Args:
        name: One of `RECIPES`.
        given: Dotted names of settings.

    Raises:
        ValueError: There is no such recipe, or it needs a setting that is not given.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}. Recipes: {', '.join(RECIPES)}.")
    # One data set is a source too.
    given = {*given, "sources"} if "dataset_path" in given else given
    needed = {key: why for key, why in RECIPES[name].required.items() if key not in given}
    if needed:
        reasons = "; ".join(f"{key} ({why})" for key, why in needed.items())
        raise ValueError(f"Recipe {name!r} needs {reasons}.")
    return {
        setting: value
        for setting, value in RECIPES[name].settings.items()
        if not (setting == "sources" and "dataset_path" in given)
    }


def recipe_config(name: str, **settings: Any) -> CrosscoderRunnerConfig:
    """The configuration of a recipe.

    Args:
        name: One of `RECIPES`.
        settings: What the recipe asks for and what should differ from it; `sae`, `model_a` and
            `model_b` as mappings, of which the other entries keep the recipe's values.

    Raises:
        ValueError: There is no such recipe, or something that it needs is not given.

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


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with some replaced.

    >>> merge({"sae": {"k": 1, "d_sae": 8}, "lr": 1}, {"sae": {"k": 2}})
    {'sae': {'k': 2, 'd_sae': 8}, 'lr': 1}
    """
    merged = dict(settings)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name.

    >>> flattened({"sae": {"k": 2}, "lr": 1})
    {'sae.k': 2, 'lr': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
