"""Models that cannot be paired, refused at opening and by the reason; those that only look so,
opened."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLNetConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.opening.fitting import check_causal, check_reads_in_order, probe

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
OF_GEMMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
Make = Callable[[PreTrainedModel], ModelConfig]


@pytest.fixture
def saved(tmp_path: Path, llama_folder: Path) -> Make:
    """A model in a folder, with the tiny Llama's tokenizer of 400 tokens."""

    def saved(model: PreTrainedModel) -> ModelConfig:
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "model")
        return ModelConfig(str(tmp_path / "model"))

    return saved


def refusal(cfg: ModelConfig, other: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of a model that it refuses, which is one line."""
    arguments = ["train", "--model-a.model-name", cfg.model_name]
    arguments += ["--model-a.model-class-name", cfg.model_class_name]
    arguments += ["--model-b.model-name", str(other), "--sae.d-sae", "64", "--sae.k", "4"]
    capsys.readouterr()
    assert main(arguments) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("sae-lens-dfc: error: ")
    return last


# --- models that read ahead ---


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: BertLMHeadModel(BertConfig(**SMALL)), "(bert) reads a text in both directions"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            ),
            "(t5) is an encoder with a decoder",
        ),
    ],
    ids=["bert", "t5"],
)
def test_what_is_no_decoder_is_refused_by_that_reason(
    model: Callable[[], PreTrainedModel],
    why: str,
    saved: Make,
    llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(saved(model()), llama_folder, capsys)
    assert why in said and said.endswith("Llama or Mamba).")


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(),
        XLMConfig(),
        XLNetConfig(),
        BartConfig(),
        AutoConfig.for_model("modernbert"),
        Gemma3TextConfig(**OF_GEMMA, use_bidirectional_attention=True),
    ],
    ids=lambda config: config.model_type,
)
def test_configurations_of_models_that_read_ahead_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ValueError, match="in both directions|an encoder with a decoder"):
        check_causal(config, "x")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(is_decoder=True),
        RobertaConfig(is_decoder=True),
        XLMConfig(causal=True),
        BartConfig(is_encoder_decoder=False, is_decoder=True),
        Gemma3TextConfig(**OF_GEMMA),
        AutoConfig.for_model("modernbert-decoder"),
        AutoConfig.for_model("llava"),
    ],
    ids=lambda config: config.model_type,
)
def test_configurations_of_decoders_are_taken_whatever_their_family(
    config: PretrainedConfig,
) -> None:
    check_causal(config, "x")


def test_no_common_decoder_is_taken_for_anything_else() -> None:
    kinds = ["gpt2", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2"]
    kinds += ["phi", "phi3", "mamba", "mamba2", "falcon", "bloom", "opt", "olmo2", "gpt_oss"]
    assert set(kinds) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in kinds:
        check_causal(AutoConfig.for_model(kind), kind)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_ahead_is_found_out_whatever_its_configuration_says(
    dtype: str, saved: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens_dfc.models.loading.check_causal", lambda *_: None)
    config = Gemma3TextConfig(**OF_GEMMA, use_bidirectional_attention=True)
    cfg = replace(saved(Gemma3ForCausalLM(config)), dtype=dtype)
    with pytest.raises(ValueError, match=r"reads ahead: at hook 'blocks.1.hook_resid_post'"):
        load_model(cfg)
    # What is read before any other token comes into it is the token's own.
    assert load_model(replace(cfg, hook_name="blocks.0.hook_in")).d_model == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **OF_GEMMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            )
        ),
        lambda: Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=400,
                hidden_size=16,
                num_hidden_layers=2,
                state_size=8,
                num_heads=4,
                head_dim=8,
                n_groups=1,
            )
        ),
        lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
    ],
    ids=["experts", "mamba2", "bert as a decoder"],
)
def test_decoders_of_every_kind_are_opened(
    make: Callable[[], PreTrainedModel], dtype: str, saved: Make
) -> None:
    assert load_model(replace(saved(make()), dtype=dtype)).d_model == 16


def moved(*shares: float, eps: float = 2.0**-23) -> None:
    """Judge a model whose first tokens move by these shares in the probes, and whose later ones are
    others."""
    acts = torch.ones(2 * len(shares), 8, 16)
    for i, share in enumerate(shares):
        acts[2 * i + 1, 1] *= 1 + share
        acts[2 * i + 1, 4:] = 9
    check_reads_in_order(acts, eps, "hook", "x")


def test_rounding_is_not_reading_ahead() -> None:
    moved(0, 0)
    moved(1e-5, 1e-5)
    moved(0.02, 0.02, eps=2.0**-7)
    moved(0.5, 0)  # other experts for a token that was between two
    for share, eps in ((1e-3, 2.0**-23), (0.2, 2.0**-7)):
        with pytest.raises(ValueError, match="'x' reads ahead: at hook 'hook'"):
            moved(share, share, eps=eps)


@pytest.mark.parametrize(("n_embeddings", "n_ctx"), [(2, 8), (50_257, 1024), (400, 3), (400, 2)])
def test_a_probe_fits_the_model_and_its_pairs_differ_in_later_tokens_only(
    n_embeddings: int, n_ctx: int
) -> None:
    ids = probe(n_embeddings, n_ctx)
    n_shared = min(4, n_ctx - 1)
    assert ids.min() >= 0 and ids.max() < n_embeddings and ids.shape[1] == min(8, n_ctx)
    assert torch.equal(ids[0::2, :n_shared], ids[1::2, :n_shared])
    assert bool((ids[0::2, n_shared:] != ids[1::2, n_shared:]).all())


# --- tokenizers with more tokens than the model ---


def tiny_gpt2(folder: Path, tokenizer: Any, n: int) -> ModelConfig:
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=n, n_embd=24, n_layer=2, n_head=3, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return ModelConfig(str(folder), "blocks.0.hook_resid_post")


@pytest.fixture
def padded(tmp_path: Path, gpt2_folder: Path) -> ModelConfig:
    """A model whose tokenizer was given a padding token for which the model has no embedding."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    n = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == n
    return tiny_gpt2(tmp_path / "padded", tokenizer, n)


@pytest.mark.slow
def test_a_tokenizer_whose_text_has_more_tokens_than_the_model_is_refused_with_both_numbers(
    tmp_path: Path, gpt2_folder: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    n = len(tokenizer)
    cfg = tiny_gpt2(tmp_path / "small", tokenizer, n - 60)
    said = refusal(cfg, llama_folder, capsys)
    assert f"'small' has {n} tokens, and the model has embeddings for {n - 60}" in said
    tokenizer.add_tokens(["catamaran"])  # a word, which stands for itself in a text
    cfg = tiny_gpt2(tmp_path / "word", tokenizer, n)
    assert f"embeddings for {n}: 'catamaran' is number {n}." in refusal(cfg, llama_folder, capsys)


def test_a_model_with_more_embeddings_than_tokens_is_opened(
    tmp_path: Path, gpt2_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    model = load_model(tiny_gpt2(tmp_path / "wide", tokenizer, 640))
    assert model.n_embeddings == 640 > len(model.tokenizer)


@pytest.mark.slow
def test_every_kind_of_tokenizer_fits_the_model_that_was_made_for_it(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    for name, tokenizer in tokenizers.items():
        load_model(tiny_gpt2(tmp_path / name, tokenizer, len(tokenizer)))
        with pytest.raises(ValueError, match=f"embeddings for {len(tokenizer) - 1}"):
            load_model(tiny_gpt2(tmp_path / name, tokenizer, len(tokenizer) - 1))


def test_a_padding_token_without_an_embedding_stands_in_nobodys_way(padded: ModelConfig) -> None:
    model = load_model(padded)
    prompts = [prompt_ids(model, text) for text in ("The cat", "The cat sat on the mat")]
    answers = answer(model, prompts, Sampling(max_new_tokens=4, temperature=0), seed=0)
    assert len(answers) == 2
    pair = ModelPair(model, model)
    assert len(pair.segments("The cat sat on the mat.")[0]) > 3


def test_a_text_that_spells_such_a_token_out_is_one_clear_error(padded: ModelConfig) -> None:
    model = load_model(padded)
    n = model.n_embeddings
    said = rf"The text has '<\|pad\|>', token {n} of model 'padded', which has embeddings for {n} "
    with pytest.raises(ValueError, match=said):
        prompt_ids(model, "The cat<|pad|>")
    with pytest.raises(ValueError, match=said):
        ModelPair(model, model).segments("The cat <|pad|> sat")


@pytest.mark.slow
def test_a_training_leaves_out_the_documents_that_spell_such_a_token_out(
    padded: ModelConfig, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(n_such: int) -> tuple[int, str]:
        texts = [f"The cat sat on mat number {i}. " * 4 for i in range(40)]
        texts[3 : 3 + n_such] = ["The <|pad|> sat on the mat."] * n_such
        rows = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "text.jsonl").write_text(rows)
        arguments = ["train", "--model-a.model-name", padded.model_name]
        arguments += ["--model-b.model-name", str(llama_folder), "--sae.d-sae", "64"]
        arguments += ["--sae.k", "4", "--context-size", "32", "--training-tokens", "640"]
        arguments += ["--train-batch-size-tokens", "64", "--n-batches-in-buffer", "2"]
        arguments += ["--dataset-path", str(tmp_path / "text.jsonl")]
        capsys.readouterr()
        status = main([*arguments, "--output-path", str(tmp_path / f"run {n_such}")])
        return status, capsys.readouterr().err.splitlines()[-1]

    assert trained(1)[0] == 0
    status, said = trained(2)
    assert status == 1 and "2 of the" in said and "The text has '<|pad|>', token" in said


def test_tokens_that_transformer_lens_invents_need_no_embedding(
    tmp_path: Path, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers["byte_bpe"]
    folder = tmp_path / "bare"
    cfg = tiny_gpt2(folder, tokenizer, len(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model = load_model(cfg)
    assert max(model.tokenizer.get_vocab().values()) >= model.n_embeddings
    assert model.bos_ids == ()


# --- TransformerLens' older class ---


def test_whatever_the_older_class_fails_on_the_newer_one_is_named(
    saved: Make, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2 = saved(GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=24, n_layer=2, n_head=3)))
    assert load_model(gpt2).d_model == 24
    older = replace(gpt2, model_class_name="HookedTransformer")
    said = refusal(older, llama_folder, capsys)
    assert "HookedTransformer cannot open" in said
    assert "Use model_class_name='TransformerBridge'." in said


def test_a_hooked_model_from_outside_is_looked_at_too(llama_config: ModelConfig) -> None:
    model = load_model(llama_config)
    again = HookedModel(model.model, model.hook_name)
    assert again.n_embeddings == LlamaConfig.from_pretrained(llama_config.model_name).vocab_size
