"""Two tiny language models of different architecture, width, depth and tokenizer, made from
configs: no download."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.organisms.from_scratch import BOS
from tests.helpers import forget_formats
from tests.model_classes import MODEL_CLASSES
from tests.tokenizer_kinds import TOKENIZERS, byte_bpe_english, sentencepiece_bpe

# The option of pyproject.toml takes one package where the type checker has arguments.
install_import_hook(
    "benchmarks", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with a thread for each core in every one of them, all wait for one
    # another. The environment is for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A busy machine is not a failed test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-strings",
        type=int,
        default=100_000,
        help="how many strings the fuzz of the alignment tries (tests/reliability), about 2 ms each",
    )
    parser.addoption(
        "--kills", type=int, default=4, help="kills of each job in tests/reliability/test_kills.py"
    )
    parser.addoption(
        "--minutes",
        type=float,
        default=1,
        help="length of each loop in tests/reliability/test_long_runs.py",
    )
    parser.addoption(
        "--mutations",
        type=int,
        default=300,
        help="damaged files of each kind in tests/reliability/test_hostile_mutations.py",
    )

    parser.addoption(
        "--slow-minutes",
        type=float,
        help="skip the slow tests that would begin after so many minutes, and say so",
    )


LONGEST = ("test_demo.py", "test_screen.py", "test_data_parallel.py", "test_tutorials.py")
"""Files that take longest. A worker takes a whole file, so that one begun last would end long after
all others."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    seen: set[str] = set()
    for item in items:
        if item.get_closest_marker("first_is_fast") and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)


BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes: float | None = item.config.getoption("--slow-minutes")
    is_late = minutes is not None and time.monotonic() - BEGAN > 60 * minutes
    if is_late and item.get_closest_marker("slow"):
        pytest.skip(f"out of time after {minutes:g} minutes; `make test-all` runs it")


@pytest.fixture
def measured_anew() -> Iterator[None]:
    """Nothing is known of the devices' number formats before the test, and nothing after it."""
    forget_formats()
    yield
    forget_formats()


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
    tokenizer = _save(byte_bpe_english(), folder)
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
    tokenizer = _save(sentencepiece_bpe(), folder)
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


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def model(request: pytest.FixtureRequest, llama_config: ModelConfig) -> HookedModel:
    """In either of TransformerLens' classes, with a token to pad with, which generating wants."""
    model = load_model(replace(llama_config, model_class_name=request.param))
    model.tokenizer.pad_token = "<s>"
    return model
