from typing import Any

import pytest

from sae_lens_dfc import DeltaTrainingCrosscoderConfig, DFCTrainingCrosscoderConfig
from sae_lens_dfc.models.number_formats import fast_dtype
from sae_lens_dfc.training.recipes.named import RECIPES
from sae_lens_dfc.training.recipes.settings import recipe_config

# What the caller must give for each recipe.
GIVEN: dict[str, dict[str, Any]] = {
    "dfc-reassigned": {"sae": {"d_sae": 2048}},
    "llama3.1-8b-vs-qwen3-8b": {
        "model_a": {"hook_name": "blocks.16.hook_resid_post"},
        "model_b": {"hook_name": "blocks.18.hook_resid_post"},
        "dataset_path": "mix",
    },
    "gpt-oss-20b-vs-deepseek-r1-qwen3-8b": {"dataset_path": "mix"},
    "delta-narrow-finetune": {
        "model_a": {"model_name": "base", "hook_name": "blocks.14.hook_resid_post"},
        "model_b": {"model_name": "tuned", "hook_name": "blocks.14.hook_resid_post"},
        "dataset_path": "mix",
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration_once_it_is_given_what_it_asks_for(name: str) -> None:
    cfg = recipe_config(name, **GIVEN[name])
    assert cfg.sae.architecture() == RECIPES[name].settings["architecture"]


@pytest.mark.parametrize("name", ["llama3.1-8b-vs-qwen3-8b", "gpt-oss-20b-vs-deepseek-r1-qwen3-8b"])
def test_the_dfc_papers_settings_are_those_of_its_tables(name: str) -> None:
    cfg = recipe_config(name, **GIVEN[name])
    sae = cfg.sae
    assert isinstance(sae, DFCTrainingCrosscoderConfig)
    assert (sae.d_sae, sae.k, sae.k_at(0), sae.k_at(2500), sae.k_at(5000)) == (
        *(131_072, 200, 1000, 600, 200),
    )
    assert (sae.n_a_exclusive, sae.n_b_exclusive, sae.decoder_norm) == (6553, 6553, "sum")
    assert (sae.aux_loss_coefficient, sae.decoder_init_norm) == (0.03, 0.4)
    trainer = cfg.to_sae_trainer_config()
    assert (trainer.total_training_steps, trainer.train_batch_size_samples) == (100_000, 2048)
    assert (trainer.lr, trainer.lr_warm_up_steps) == (1e-4, 1000)
    assert trainer.autocast == (fast_dtype("cpu") == "bfloat16")
    # Dead after 10,000,000 tokens.
    assert trainer.dead_feature_window * 2048 == pytest.approx(10_000_000, rel=1e-3)


def test_the_delta_papers_settings_are_its_budgets_and_loss() -> None:
    cfg = recipe_config("delta-narrow-finetune", **GIVEN["delta-narrow-finetune"])
    sae = cfg.sae
    assert isinstance(sae, DeltaTrainingCrosscoderConfig)
    assert sae.k * sae.delta_share_of_k == pytest.approx(200)
    assert (sae.d_sae, sae.n_delta, sae.delta_loss_coefficient) == (17_920, 14_336, 0.005)
    trainer = cfg.to_sae_trainer_config()
    assert (trainer.total_training_steps, trainer.train_batch_size_samples) == (50_000, 4096)


def test_what_is_given_wins_over_the_recipe() -> None:
    cfg = recipe_config("dfc-reassigned", sae={"d_sae": 4096}, lr=3e-4)
    assert (cfg.sae.d_sae, cfg.lr) == (4096, 3e-4)
    assert isinstance(cfg.sae, DFCTrainingCrosscoderConfig)
    assert (cfg.sae.decoder_norm, cfg.reassign_at) == ("sum", [0.8, 0.95])


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.required])
def test_what_a_recipe_does_not_say_is_asked_for_with_the_reason(name: str) -> None:
    asked = RECIPES[name].required
    with pytest.raises(ValueError, match=f"Recipe '{name}' needs ") as error:
        recipe_config(name)
    assert all(f"{key} ({why})" in str(error.value) for key, why in asked.items())


def test_the_papers_two_sources_give_way_to_one_data_set() -> None:
    name = "gpt-oss-20b-vs-deepseek-r1-qwen3-8b"
    sources = recipe_config(name).all_sources
    assert [(s.dataset_path, s.weight) for s in sources] == [
        ("HuggingFaceFW/fineweb", 0.5),
        ("lmsys/lmsys-chat-1m", 0.5),
    ]
    (only,) = recipe_config(name, dataset_path="mine").all_sources
    assert only.dataset_path == "mine"


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="There is no recipe 'x'. Recipes: dfc-reassigned, llama3.1"
    ):
        recipe_config("x")
