import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.opening.pretrained import Loading, load_pretrained
from tests.architectures import save_tiny
from tests.helpers import train_tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def untied(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, which has a head of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(llama_folder, folder)
    return folder


@pytest.fixture
def tied(untied: Path) -> Path:
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (untied / "config.json").write_text(json.dumps(config))
    rewrite(untied, lambda name, weight: None if name == "lm_head.weight" else (name, weight))
    return untied


def rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> None:
    """Write a folder's weights again, each as `change` gives it back."""
    weights = load_file(folder / WEIGHTS)
    changed = (change(name, weight) for name, weight in weights.items())
    save_file(dict(one for one in changed if one), folder / WEIGHTS, {"format": "pt"})


def without_layer_1(name: str, weight: Tensor) -> tuple[str, Tensor] | None:
    return None if ".layers.1." in name else (name, weight)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match="Could not load model") as refused:
        load_model(ModelConfig(str(folder)))
    return str(refused.value)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module.", "policy.model."])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_prefix_before_every_name_is_stripped_and_said(
    prefix: str, kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    plain = load_model(ModelConfig(str(folder)))
    rewrite(folder, lambda name, weight: (prefix + name, weight))
    stripped = load_model(ModelConfig(str(folder)))
    assert stripped.describe() == plain.describe()
    assert stripped.notes == (f"The prefix {prefix!r} was stripped from the names of its weights.",)
    assert plain.notes == ()


def test_a_prefix_before_some_of_the_names_is_stripped_from_those(untied: Path) -> None:
    plain = load_model(ModelConfig(str(untied))).describe()
    rewrite(untied, lambda name, weight: (name if "norm" in name else f"module.{name}", weight))
    assert load_model(ModelConfig(str(untied))).describe() == plain


def test_two_prefixes_are_refused(untied: Path) -> None:
    rewrite(untied, lambda n, weight: (f"module.{n}" if "norm" in n else f"policy.{n}", weight))
    assert "which would be random, has 30 weights (module.model.layers.0" in refusal(untied)


def test_a_missing_shard_is_refused_by_the_names_of_its_weights(untied: Path) -> None:
    rewrite(untied, without_layer_1)
    message = refusal(untied)
    assert "its checkpoint lacks 9 weights (model.layers.1.input_layernorm.weight, " in message
    assert message.endswith("Is a file of weights missing? Copy all of them into the folder.")


def test_a_model_without_its_head_is_refused_where_the_embedding_does_not_stand_for_it(
    untied: Path,
) -> None:
    AutoModel.from_pretrained(untied).save_pretrained(untied)
    message = refusal(untied)
    assert "lacks 1 weight (lm_head.weight), which would be random" in message
    assert "It was saved without its head: save it whole" in message


def test_a_model_without_its_head_opens_where_the_embedding_is_the_head(tied: Path) -> None:
    plain = load_model(ModelConfig(str(tied))).describe()
    AutoModel.from_pretrained(tied).save_pretrained(tied)
    assert load_model(ModelConfig(str(tied))).describe() == plain


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_classifier_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    # Its head is random, and says so.
    with torch.random.fork_rng():
        AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    assert "has 1 weight (score.weight) that LlamaForCausalLM does not have" in refusal(folder)


def test_what_a_model_sees_with_may_be_left_over_and_nothing_else(
    tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = tokenizers["byte_bpe"]
    save_tiny("llama4", tmp_path, Path(tokenizer.name_or_path), len(tokenizer))
    weights = load_file(tmp_path / WEIGHTS)
    assert any("vision_model" in name for name in weights)
    opened = load_pretrained(str(tmp_path), None, "float32").model
    assert type(opened).__name__ == "Llama4ForCausalLM"
    save_file(weights | {"score.weight": torch.ones(2, 32)}, tmp_path / WEIGHTS, {"format": "pt"})
    assert "has 1 weight (score.weight) that Llama4ForCausalLM does not have" in refusal(tmp_path)


def test_weights_of_another_shape_are_refused_with_both_shapes(untied: Path) -> None:
    rewrite(untied, lambda n, w: (n, w[:8].contiguous() if n.endswith("q_proj.weight") else w))
    message = refusal(untied)
    assert "q_proj.weight [8, 16] for [16, 16]" in message
    assert message.endswith("Correct config.json, or resize the model before saving it.")


def test_masks_and_frequencies_that_older_versions_saved_are_no_weights(
    gpt2_folder: Path, untied: Path, tmp_path: Path
) -> None:
    old_gpt2 = tmp_path / "gpt2"
    shutil.copytree(gpt2_folder, old_gpt2)
    for folder, extra in (
        (old_gpt2, {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}),
        (untied, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ):
        save_file(load_file(folder / WEIGHTS) | extra, folder / WEIGHTS, {"format": "pt"})
        assert load_model(ModelConfig(str(folder))).notes == ()


def test_whatever_opens_has_the_same_weights_each_time(untied: Path, gpt2_folder: Path) -> None:
    for folder, whole in ((untied, LlamaForCausalLM), (gpt2_folder, GPT2LMHeadModel)):
        first, second = (load_pretrained(str(folder), None, "float32").model for _ in range(2))
        expected = whole.from_pretrained(folder).state_dict()
        for model in (first, second):
            found = model.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transformers_own_report_is_not_printed_beside_the_refusal(
    untied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(untied, without_layer_1)
    refusal(untied)
    assert not caplog.records


def test_training_with_a_model_that_lacks_weights_ends_before_it_begins(
    llama_folder: Path, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(untied, without_layer_1)
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 50)
    output = tmp_path / "run"
    status = main(
        [
            "train",
            *("--model-a.model-name", str(llama_folder), "--model-b.model-name", str(untied)),
            *("--dataset-path", str(tmp_path / "text.txt"), "--output-path", str(output)),
            *("--sae.d-sae", "64", "--sae.k", "6"),
        ]
    )
    error = capsys.readouterr().err
    assert status == 1
    assert error.splitlines()[-1].startswith("sae-lens-dfc: error: Could not load model ")
    assert "lacks 9 weights" in error
    assert not output.exists()


@pytest.mark.slow
def test_a_stripped_model_is_trained_and_measured(
    llama_folder: Path, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(untied, lambda name, weight: (f"_orig_mod.module.{name}", weight))
    run = train_tiny(tmp_path, llama_folder, untied)
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert "Explained variance, B" in capsys.readouterr().out


def test_the_head_of_any_kind_is_known_by_its_name() -> None:
    for name in ("lm_head.weight", "embed_out.weight", "lm_head.bias"):
        assert "without its head" in Loading([name], [], []).complaint("GPTNeoXForCausalLM")
    assert "file of weights" in Loading(["lm_head.weight", "x.y"], [], []).complaint("GPT2")
