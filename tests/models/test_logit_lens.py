from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_lens
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.decoding import spelled, text_of
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.logit_lens import (
    direct_logit_effects,
    extreme_tokens,
    final_norm,
    has_direct_effect,
)
from tests.model_classes import needs_hooked_transformer


def opened(which: str, llama: ModelConfig, gpt2: ModelConfig) -> HookedModel:
    """RMSNorm or LayerNorm, in either of TransformerLens' classes."""
    if which == "HookedTransformer, LayerNorm":
        older: Any = transformer_lens
        # From disk it opens no GPT-2.
        tokenizer = AutoTokenizer.from_pretrained(gpt2.model_name)
        config = older.HookedTransformerConfig(
            n_layers=1,
            d_model=15,
            n_ctx=16,
            d_head=5,
            d_vocab=500,
            act_fn="gelu",
            normalization_type="LN",
        )
        return HookedModel(older.HookedTransformer(config, tokenizer), "blocks.0.hook_resid_post")
    class_name, norm = which.split(", ")
    name = llama.model_name if norm == "RMSNorm" else gpt2.model_name
    return load_model(ModelConfig(name, "blocks.0.hook_resid_post", class_name))  # type: ignore[arg-type]


@torch.no_grad()
def make_norm_matter(model: HookedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.ln_final.parameters():  # type: ignore[union-attr]
        parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)


@torch.no_grad()
def change_of_logits(model: HookedModel, stream: Tensor, direction: Tensor) -> Tensor:
    """Of a small step along `direction`, by the model's own norm and unembedding."""
    there, back = (
        model.model.unembed(model.model.ln_final((stream + step * direction)[None, None]))
        for step in (0.1, -0.1)
    )
    return ((there - back) / 0.2)[0, 0]


@pytest.mark.parametrize(
    "which",
    [
        "TransformerBridge, RMSNorm",
        "TransformerBridge, LayerNorm",
        pytest.param("HookedTransformer, RMSNorm", marks=needs_hooked_transformer),
        pytest.param("HookedTransformer, LayerNorm", marks=needs_hooked_transformer),
    ],
)
def test_effects_are_what_the_models_own_norm_and_unembedding_make_of_a_step(
    llama_config: ModelConfig, gpt2_config: ModelConfig, which: str
) -> None:
    model = opened(which, llama_config, gpt2_config)
    make_norm_matter(model)
    directions = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(2))
    for direction, effect in zip(directions, direct_logit_effects(model, directions), strict=True):
        inside = direction - direction.mean() if "LayerNorm" in which else direction
        # A stream of the other dimensions' size to which the direction is orthogonal: its step
        # changes no scale.
        stream = 100 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
        stream = stream - stream.mean()
        stream = stream - inside * (stream @ inside) / (inside @ inside)
        size = (
            (stream - stream.mean()).pow(2).mean().sqrt()
            if "Layer" in which
            else stream.pow(2).mean().sqrt()
        )
        change = change_of_logits(model, stream, direction) * size / inside.norm()
        torch.testing.assert_close(effect, change - change.mean(), atol=2e-3, rtol=2e-3)
        assert effect.std() > 0.01


def test_gemmas_norm_weight_is_one_plus_what_is_stored(
    llama_config: ModelConfig,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_config.model_name)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        architectures=["Gemma3ForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        gemma = Gemma3ForCausalLM(config).eval()
        stored = torch.randn(16)
    gemma.model.norm.weight.data.copy_(stored)
    bridge = TransformerBridge.boot_transformers(
        "google/gemma-3-270m", hf_model=gemma, tokenizer=tokenizer, device="cpu"
    )
    model = HookedModel(bridge, "blocks.0.hook_resid_post", "gemma")
    norm = final_norm(model)
    torch.testing.assert_close(norm.weight, 1 + stored, atol=1e-4, rtol=1e-4)
    assert not norm.is_centered
    # The vocabulary is padded by tokens that no text has.
    n = len(model.tokenizer)
    assert n < config.vocab_size and direct_logit_effects(model, torch.randn(2, 16)).shape == (2, n)


def test_the_tokens_promoted_most_come_first_and_the_suppressed_are_the_others(
    pair: ModelPair,
) -> None:
    W_U = pair.b.model.W_U.detach()
    token = 470
    direction = (W_U[:, token] - W_U.mean(dim=1))[None]
    ((promoted, suppressed),) = extreme_tokens(pair.b, direction, n=5)
    ((turned_promoted, turned_suppressed),) = extreme_tokens(pair.b, -direction, n=5)
    assert promoted[0][0] == text_of(pair.b.tokenizer, token)
    values = [value for _, value in promoted]
    assert values == sorted(values, reverse=True) and values[-1] > 0 > suppressed[0][1]
    assert [text for text, _ in turned_suppressed] == [text for text, _ in promoted]
    assert [text for text, _ in turned_promoted] == [text for text, _ in suppressed]


@pytest.mark.slow
def test_a_models_effect_needs_its_residual_stream_and_its_unembedding(
    gpt2_config: ModelConfig, llama_config: ModelConfig
) -> None:
    heads = load_model(ModelConfig(gpt2_config.model_name, "blocks.0.attn.hook_z"))
    cut = load_model(
        ModelConfig(llama_config.model_name, llama_config.hook_name, drop_unused_layers=True)
    )
    for model in (heads, cut):
        assert not has_direct_effect(model)
        with pytest.raises(ValueError, match="no direct logit effect"):
            direct_logit_effects(model, torch.randn(1, model.d_model))
    assert has_direct_effect(load_model(gpt2_config))


def test_a_model_without_its_upper_layers_has_the_same_effects_if_its_unembedding_is_kept(
    llama_config: ModelConfig,
) -> None:
    cfg = replace(llama_config, hook_name="blocks.0.hook_resid_post")
    whole, cut = load_model(cfg), load_model(cfg)
    cut.drop_unused_layers(keep_unembedding=True)
    assert len(cut.model.blocks) < len(whole.model.blocks)
    directions = torch.randn(2, whole.d_model)
    effects = direct_logit_effects(whole, directions)
    assert torch.equal(direct_logit_effects(cut, directions), effects)


def test_a_token_is_shown_with_its_space_and_bytes_of_a_character_as_the_vocabulary_has_them(
    pair: ModelPair,
) -> None:
    for tokenizer in (pair.a.tokenizer, pair.b.tokenizer):
        ids = tokenizer(" the", add_special_tokens=False)["input_ids"]
        assert "".join(text_of(tokenizer, i) for i in ids).strip() == "the"
        first = tokenizer("naïve", add_special_tokens=False)["input_ids"]
        assert "".join(t for segment in spelled(tokenizer, [first]) for t in segment) == "naïve"
    assert text_of(pair.b.tokenizer, 0) == pair.b.tokenizer.convert_ids_to_tokens(0)
    byte = pair.b.tokenizer.get_vocab()["<0xC3>"]
    assert text_of(pair.b.tokenizer, byte) == "<0xC3>"
