"""Named settings for `train`: the papers' runs, our best benchmark setting, and public model
organisms.

A recipe is a mapping of settings as `sae-lens-dfc train --config` takes them. If a paper does not
print the hook or the text, the recipe requires them from the user. For other settings that a paper
omits, our defaults apply: context length, Adam's betas and no decay of lr; for the Delta-Crosscoder
also input normalization, decoder initialization norm, warm-up and the dead-latent window. The hook
in the residual stream is assumed to be a block's output.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens_dfc.models.config import AUTO
from sae_lens_dfc.training.recipes.organisms import RECIPE_PREFIX, organisms

REASSIGN_AT = (0.8, 0.95)
"""Fractions of the training at which `dfc-reassigned` tests its exclusive latents
(benchmarks/README.md)."""


@dataclass(frozen=True)
class Recipe:
    """Settings with their source.

    Args:
        summary: One line: what it trains and where the settings come from.
        settings: Nested settings; `architecture` names the crosscoder.
        required: Settings that the source omits and the caller must give: dotted names, each with a
            reason.
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
        # Table 3 has (4096 + 2880) / 4 = 1744 for the second pair, which is the default; the text
        # says 512.
        "k_aux": None,
        "decoder_init_norm": 0.4,
        "normalization": "median_norm",
        "decoder_norm": "sum",
    },
    # The paper does not say which parts of these data sets it uses.
    "sources": [
        {"dataset_path": "HuggingFaceFW/fineweb", "weight": 0.5},
        {"dataset_path": "lmsys/lmsys-chat-1m", "weight": 0.5, "text_column": "conversation"},
    ],
    "max_unique_pairs": 100_000_000,
    "training_tokens": 204_800_000,
    "train_batch_size_tokens": 2048,
    "lr": 1e-4,
    "lr_warm_up_steps": 1000,
    # Dead after 10,000,000 tokens without firing.
    "dead_feature_window": 4882,
    "autocast": AUTO,
}

RECIPES: dict[str, Recipe] = {
    "dfc-reassigned": Recipe(
        "A DFC whose exclusive latents are tested twice, late in training; sizes, k and lr stay yours (benchmarks/README.md)",
        {
            "architecture": "dfc",
            "sae": {"decoder_norm": "sum"},
            "reassign_at": list(REASSIGN_AT),
        },
        {"sae.d_sae": "number of latents: as many as the text can train"},
    ),
    "llama3.1-8b-vs-qwen3-8b": Recipe(
        "DFC, 131,072 latents, between two chat models (arXiv 2602.11729, table 2)",
        {
            **_DFC_PAPER,
            "model_a": {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "dtype": AUTO},
            "model_b": {"model_name": "Qwen/Qwen3-8B", "dtype": AUTO},
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
                "dtype": AUTO,
            },
            "model_b": {
                "model_name": "openai/gpt-oss-20b",
                "hook_name": "blocks.12.hook_resid_post",
                "dtype": AUTO,
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
            "model_a": {"dtype": AUTO},
            "model_b": {"dtype": AUTO},
            "context_size": 1024,
            "training_tokens": 204_800_000,
            "train_batch_size_tokens": 4096,
            "lr": 1e-4,
            "autocast": AUTO,
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
"""All recipes except those of model organisms, which `find_recipe` creates."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, from `RECIPES` or for a public model organism.

    Raises:
        ValueError: There is no such recipe.

    >>> find_recipe("organism-taboo-gold-qwen3-1.7b").settings["model_a"]["model_name"]
    'Qwen/Qwen3-1.7B'
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in organisms():
        organism = organisms()[name]
        return Recipe(organism.summary, organism.settings())
    matches = difflib.get_close_matches(name, [*RECIPES, *organisms()], n=3)
    close = f" Close: {', '.join(matches)}." if matches else ""
    raise ValueError(
        f"There is no recipe {name!r}.{close} Recipes: {', '.join(RECIPES)}, "
        f"and {len(organisms())} whose names begin with {RECIPE_PREFIX} (docs/how-to/organisms.md)."
    )
