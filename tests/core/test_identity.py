"""Which settings decide what is trained or cached: each of them is looked at here, also those that
are yet to come."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import pytest

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoderConfig,
    CrosscoderRunnerConfig,
    DeltaTrainingCrosscoderConfig,
    DFCTrainingCrosscoderConfig,
    DSFTrainingCrosscoderConfig,
    ModelConfig,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.core.identity import deciding, first_difference, other_devices, same_wherever
from sae_lens_dfc.data.config import CacheConfig, SourceConfig
from sae_lens_dfc.data.pair import ModelPair

# A field that is in neither list fails the tests: say here whether another value of it can change a
# batch or a weight.
DECIDE: dict[type, str] = {
    CrosscoderRunnerConfig: """
        sources sae other_saes eval_every_n_documents max_unique_pairs context_size store_batch_size_prompts autocast_lm compile_llm
        llm_compilation_mode outlier_factor seed n_ranks cache_window_shards keep_in_memory training_tokens
        train_batch_size_tokens n_batches_in_buffer activations_mixing_fraction n_batches_for_norm_estimate lr lr_scheduler_name
        lr_warm_up_steps lr_decay_steps adam_beta1 adam_beta2 dead_feature_window feature_sampling_window autocast compile_sae
        sae_compilation_mode
    """,
    CacheConfig: """
        sources eval_every_n_documents max_unique_pairs context_size store_batch_size_prompts autocast_lm compile_llm llm_compilation_mode
        outlier_factor seed n_ranks cache_dtype shard_rows save_origins
    """,
    ModelConfig: "dtype",
    SourceConfig: "weight tokenizer",
}
MAY_CHANGE: dict[type, str] = {
    CrosscoderRunnerConfig: """
        dataset_path dataset_name dataset_split text_column streaming eval_pairs cache_path prefetch_llm_batches reassign_at device
        output_path overwrite resume n_checkpoints checkpoint_path logger
    """,
    CacheConfig: """
        dataset_path dataset_name dataset_split text_column streaming eval_pairs cache_path n_writers overwrite resume
    """,
    ModelConfig: """
        model_name hook_name model_class_name device revision prepend_bos drop_unused_layers chat_template
        base base_revision adapter_subfolder dtype_was_auto
    """,
    SourceConfig: "dataset_path text_column dataset_name dataset_split streaming max_unreadable",
}
NESTED = {"model_a", "model_b"}
OF_ALL_CROSSCODERS = """
    d_in d_sae dtype apply_b_dec_to_input normalize_activations reshape_activations decoder_init_norm d_a d_b normalization
    decoder_norm aux_loss_coefficient k_aux
"""
OF_TOPK = "k k_initial k_anneal_steps topk_threshold_lr training_path encoder_product"
CROSSCODERS: dict[type, str] = {
    StandardTrainingCrosscoderConfig: "l1_coefficient l1_warm_up_steps",
    BatchTopKTrainingCrosscoderConfig: OF_TOPK,
    DSFTrainingCrosscoderConfig: f"{OF_TOPK} tied_fraction k_tied_multiplier tie",
    DeltaTrainingCrosscoderConfig: f"{OF_TOPK} shared_fraction k_shared_ratio delta_loss_coefficient",
    DFCTrainingCrosscoderConfig: f"""
        {OF_TOPK} a_exclusive_fraction b_exclusive_fraction selection reassign_steps evidence_window min_own_share
    """,
}


def settings() -> dict[str, Any]:
    """Those of a training in which every setting is in use that can be together with the others."""
    cfg = CrosscoderRunnerConfig(sae=DFCTrainingCrosscoderConfig(d_sae=64, k=4)).to_dict()
    source = asdict(SourceConfig("text.jsonl"))
    return {**cfg, "sources": [source], "compile_llm": True, "compile_sae": True}


def changed(where: list[Any], name: str) -> dict[str, Any]:
    """The settings with another value of one of them."""
    cfg = settings()
    inner: Any = cfg
    for step in where:
        inner = inner[step]
    inner[name] = [*inner[name], "other"] if isinstance(inner.get(name), list) else "other"
    return cfg


def names(said: str) -> set[str]:
    return set(said.split())


def all_fields() -> Iterator[tuple[type, list[Any], str, bool]]:
    """Each setting: where it stands, and whether it decides."""
    places: dict[type, list[Any]] = {ModelConfig: ["model_b"], SourceConfig: ["sources", 0]}
    for cls, decide in DECIDE.items():
        for field in fields(cls):
            if field.name not in NESTED:
                yield cls, places.get(cls, []), field.name, field.name in names(decide)
    for cls, own in CROSSCODERS.items():
        decide = names(own) | names(OF_ALL_CROSSCODERS)
        for field in fields(cls):
            yield cls, ["sae"], field.name, field.name in decide


@pytest.mark.parametrize("cls", DECIDE)
def test_every_setting_is_said_to_decide_or_not(cls: type) -> None:
    decide, may_change = names(DECIDE[cls]), names(MAY_CHANGE[cls])
    assert not decide & may_change
    assert {field.name for field in fields(cls)} - NESTED == decide | may_change


@pytest.mark.parametrize("cls", CROSSCODERS)
def test_every_setting_of_a_crosscoder_is_said_to_decide_or_not(cls: type) -> None:
    decide = names(CROSSCODERS[cls]) | names(OF_ALL_CROSSCODERS)
    assert {field.name for field in fields(cls)} == decide | {"device", "metadata"}


@pytest.mark.slow
def test_a_setting_makes_another_training_exactly_when_it_is_said_to_decide() -> None:
    before = deciding(settings())
    for cls, where, name, decides in all_fields():
        if name == "cache_window_shards":
            continue  # without a cache it is idle
        if where or name not in ("sources", "cache_path"):
            other = first_difference(before, deciding(changed(where, name)))
            assert (other is not None) == decides, f"{cls.__name__}.{name}: {other}"


def test_a_setting_that_does_nothing_beside_the_others_decides_nothing() -> None:
    live = settings()
    cached = {**live, "cache_path": "runs/cache"}
    plain = {**live, "compile_llm": False, "compile_sae": False}
    for cfg, name, decides in [
        (live, "cache_window_shards", False),
        (cached, "cache_window_shards", True),
        (live, "n_batches_in_buffer", True),
        (cached, "n_batches_in_buffer", False),
        (cached, "activations_mixing_fraction", False),
        (cached, "keep_in_memory", False),
        (plain, "llm_compilation_mode", False),
        (plain, "sae_compilation_mode", False),
    ]:
        assert (deciding(cfg) != deciding({**cfg, name: "other"})) == decides, name


def test_one_data_set_is_the_same_in_a_list_of_one() -> None:
    flat = {**settings(), "sources": []}
    assert deciding(flat) == deciding(settings())
    two = {**settings(), "sources": settings()["sources"] * 2}
    assert deciding(two) != deciding(settings())


def test_a_setting_of_somebody_elses_crosscoder_decides() -> None:
    cfg = settings()
    cfg["sae"]["streaming"] = False  # what a run calls by that name does not matter
    other = {**cfg, "sae": {**cfg["sae"], "streaming": True}}
    assert first_difference(deciding(cfg), deciding(other)) == "sae.streaming was False and is True"


def test_a_model_says_itself_what_its_settings_need_not_agree_in(pair: ModelPair) -> None:
    described = pair.describe()
    said = {"hook_name", "model_class_name", "prepend_bos", "weights_sha256", "tokenizer_sha256"}
    assert said <= set(same_wherever(described)["model_a"])
    moved = {**described, "model_a": {**described["model_a"], "model_name": "x", "revision": "y"}}
    assert same_wherever(moved) == same_wherever(described)


def test_only_another_kind_of_device_is_named() -> None:
    was = {"device": "cpu", "model_a": {"device": "cuda:0"}, "model_b": {"device": "cpu"}}
    now = {"device": "cpu:0", "model_a": {"device": "cuda"}, "model_b": {"device": "cuda:1"}}
    assert other_devices(was, now) == "model_b.device was cpu and is cuda:1"
    assert other_devices(None, None) == ""
