"""Two tiny language models of different architecture, width, depth and tokenizer, made from configs: no download."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sae_lens_dfc.benchmark.planted.from_scratch import BOS, byte_bpe
from sae_lens_dfc.models import HookedModel, ModelConfig, load_model
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import reference_pages

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with a thread for each core in every one of them, all wait for one another. The
    # environment is for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A busy machine is not a failed test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TRAINING_TEXT = ["The cat sat on the mat in 1989. " * 3, *reference_pages()[:6]]


def _byte_bpe() -> Tokenizer:
    return byte_bpe(TRAINING_TEXT, vocab_size=400)


def _byte_bpe_japanese() -> Tokenizer:
    """Few merges, all of bytes of Japanese: its tokens begin and end inside characters."""
    return byte_bpe(["ラーメンを食べるラーララをべー" * 20], vocab_size=290)


def _sentencepiece_bpe() -> Tokenizer:
    """Spaces are part of words, unknown characters fall back to bytes, as in Gemma and Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator((t.replace(" ", "▁") for t in TRAINING_TEXT), trainer)
    return tokenizer


def _wordpiece_lowercase() -> Tokenizer:
    """Loses case, accents and spaces: its map back to the text is not one to one, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=[BOS, "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _unigram_nfkc() -> Tokenizer:
    """NFKC makes two characters of one (ﬁ -> fi), and each piece starts with a space, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[BOS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _characters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=1, special_tokens=[BOS, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": _byte_bpe,
    "byte_bpe_japanese": _byte_bpe_japanese,
    "sentencepiece_bpe": _sentencepiece_bpe,
    "wordpiece_lowercase": _wordpiece_lowercase,
    "unigram_nfkc": _unigram_nfkc,
    "characters": _characters,
}


def _save(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    # TransformerLens wants a tokenizer that was loaded from somewhere.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: _save(make(), folder / name) for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = _save(_byte_bpe(), folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = _save(_sentencepiece_bpe(), folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=256,
        bos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_config(llama_folder: Path) -> ModelConfig:
    return ModelConfig(str(llama_folder), "blocks.1.hook_resid_post")


@pytest.fixture(scope="session")
def gpt2_config(gpt2_folder: Path) -> ModelConfig:
    return ModelConfig(str(gpt2_folder), "blocks.0.hook_resid_post")


@pytest.fixture(scope="session")
def pair(llama_config: ModelConfig, gpt2_config: ModelConfig) -> ModelPair:
    """Llama of width 16 with byte-level BPE, GPT-2 of width 24 with SentencePiece-like BPE."""
    return ModelPair.load(llama_config, gpt2_config)


@pytest.fixture(scope="module", params=["TransformerBridge", "HookedTransformer"])
def model(request: pytest.FixtureRequest, llama_config: ModelConfig) -> HookedModel:
    """In either of TransformerLens' classes, with a token to pad with, which generating wants."""
    model = load_model(replace(llama_config, model_class_name=request.param))
    model.tokenizer.pad_token = "<s>"
    return model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutations",
        type=int,
        default=300,
        help="damaged files of each kind in tests/reliability/test_hostile_mutations.py",
    )
