"""Every architecture that transformers' AutoModelForCausalLM opens and TransformerLens runs: a tiny
model of it, and what is to become of it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

N_LAYERS = 3
HYBRID = ["linear_attention", "full_attention", "linear_attention"]

ARCHITECTURES: dict[str, str] = {
    "afmoe": "AfmoeForCausalLM",
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "bamba": "BambaForCausalLM",
    "bert": "BertLMHeadModel",
    "bitnet": "BitNetForCausalLM",
    "bloom": "BloomForCausalLM",
    "codegen": "CodeGenForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "falcon": "FalconForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n": "Gemma3nForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "gpt-sw3": "GPT2LMHeadModel",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gptj": "GPTJForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "hrm_text": "HrmTextForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "internlm3": "LlamaForCausalLM",
    "iquestcoder": "LlamaForCausalLM",
    "jais2": "Jais2ForCausalLM",
    "jamba": "JambaForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "laguna": "LagunaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "modernbert-decoder": "ModernBertDecoderForCausalLM",
    "mpt": "MptForCausalLM",
    "nanochat": "NanoChatForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "xglm": "XGLMForCausalLM",
    "youtu": "YoutuForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
}
"""Model types, as config.json has them, and the class that opens each. All work that are not in the
next."""

DIFFERS = "does not compute what model .* computes in transformers: their logits differ by"
REFUSED: dict[str, str] = {
    "bert": "reads a text in both directions",
    "cohere": DIFFERS,
    "cohere2": DIFFERS,
    "gemma3n": "requires the timm library",
    "hrm_text": "is a HrmTextForCausalLM, which is not one stack of blocks",
    "openai-gpt": DIFFERS,
}
"""What is said of those that are refused, by the versions that docs/how-to/models.md names."""
RIGHT_IN_4 = {"cohere", "cohere2"}
"""Those of them that TransformerLens 4 (4.3 was tried) computes as transformers does, but for
rounding."""
IS_4 = Version(version("transformer-lens")) >= Version("4")

ROUNDED = {
    *("bloom", "codegen", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"),
    *("hunyuan_v1_dense", "mpt", "starcoder2"),
    "granitemoehybrid",  # on a processor with AMX; with AVX2 alone each bit is the same
    *((*RIGHT_IN_4, "deepseek_v2") if IS_4 else ()),
}
"""TransformerLens computes their attention in another order than transformers; of the others each
bit is the same."""
PARTS = {"deepseek_v4": 4}
"""Residual streams, where there is not one."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("n_mamba_heads", "index_n_heads", "n_groups"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "chunk_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "index_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), 64),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "index_topk"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    # Large, so that what is computed wrongly is seen.
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("eos_token_id", "pad_token_id"), None),
    "bos_token_id": 0,
}
"""By their names in any configuration that has them."""

LATENT_ATTENTION: dict[str, Any] = {"num_key_value_heads": 4}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
QWEN_VISION: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
    **{"out_hidden_size": 32, "num_position_embeddings": 16},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "gemma3": {"vision_config": {**VISION, "image_size": 28, "patch_size": 14}},
    "gemma4": {
        "text_config": {"pad_token_id": 0},
        "vision_config": {
            **VISION,
            **{"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        },
    },
    "gemma4_unified": {
        "text_config": {"pad_token_id": 0},
        "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 16},
        "audio_config": {"audio_embed_dim": 16},
    },
    "glm4_moe_lite": LATENT_ATTENTION,
    "glm_moe_dsa": LATENT_ATTENTION,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": HYBRID, "position_embedding_type": "nope"},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            **{**VISION, "image_size": 28, "vision_output_dim": 16},
            **{"projector_input_dim": 16, "projector_output_dim": 16},
        },
    },
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"pad_token_id": 0},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "qwen3_5": {"vision_config": QWEN_VISION, "text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe": {"vision_config": QWEN_VISION, "text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "youtu": LATENT_ATTENTION,
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
}
"""What a configuration needs besides; in `text_config` for the part of it that reads text."""


def refused() -> dict[str, str]:
    """What is said of those that are refused with the installed TransformerLens."""
    return {key: said for key, said in REFUSED.items() if not (IS_4 and key in RIGHT_IN_4)}


def installed() -> dict[str, str]:
    """The model types that these versions of transformers and TransformerLens open and run, and
    their classes."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    classes = {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }
    return {key: name for key, name in classes.items() if name in SUPPORTED_ARCHITECTURES}


def tiny_config(model_type: str, vocab_size: int) -> PreTrainedConfig:
    return _config(CONFIG_MAPPING[model_type], vocab_size, SPECIAL.get(model_type, {}))


def _config(
    config_class: type[PreTrainedConfig], vocab_size: int, special: dict[str, Any]
) -> PreTrainedConfig:
    names = set(config_class().to_dict())
    values = {name: value for name, value in SMALL.items() if name in names}
    vocabularies = names & {"vocab_size", "vocab_size_per_layer_input"}
    values |= dict.fromkeys(vocabularies, vocab_size) | special
    parts: dict[str, Any] = config_class.sub_configs  # type: ignore[assignment]
    if "text_config" in parts:
        text = special.get("text_config", {})
        values["text_config"] = _config(parts["text_config"], vocab_size, text)
    return config_class(**values)


def save_tiny(model_type: str, folder: Path, tokenizer: Path, vocab_size: int) -> None:
    """A random model of this type, as the hub would have it, with the files of a tokenizer."""
    config = tiny_config(model_type, vocab_size)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if model_type == "gemma3n":
        config.save_pretrained(folder)  # transformers itself cannot make the model without timm
        return
    # Where the class reads text only, a checkpoint has the part that sees all the same.
    sees = ARCHITECTURES[model_type].endswith("ForCausalLM") and hasattr(config, "text_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(stack for stack in stacks if len(stack) == N_LAYERS)
