import json
from pathlib import Path

import pytest
import torch
from transformers import (
    PersimmonConfig,
    PersimmonForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.opening import supported
from sae_lens_dfc.models.opening.supported import Computed, UnsupportedModelError, check_logits


@pytest.fixture(scope="module")
def model(llama_config: ModelConfig) -> HookedModel:
    return load_model(llama_config)


def computed(model: HookedModel, noise: float, dtype: torch.dtype) -> Computed:
    """The model's logits, off by a share of their size."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model.model(ids, return_type="logits")
    other = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return Computed(ids, (logits + other * noise * logits.norm() / other.norm()).to(dtype))


@pytest.mark.parametrize(
    ("noise", "dtype", "is_refused"),
    [
        (1e-4, torch.float32, False),
        (0.01, torch.float32, True),
        (0.01, torch.bfloat16, False),
        (0.5, torch.bfloat16, True),
        # What overflows is another fault, and has a message of its own.
        (float("nan"), torch.float16, False),
    ],
)
def test_logits_may_differ_by_what_rounding_can_do(
    model: HookedModel, noise: float, dtype: torch.dtype, is_refused: bool
) -> None:
    expected = computed(model, noise, dtype)
    if not is_refused:
        check_logits("mine", model.model, expected)
        return
    with pytest.raises(UnsupportedModelError, match=r"their logits differ by \d+\.\d%"):
        check_logits("mine", model.model, expected)


def test_the_command_says_in_one_line_that_a_model_would_be_computed_wrongly(
    tmp_path: Path,
    llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def another(model: PreTrainedModel) -> Computed:
        ids, logits = supported.computed(model)
        return Computed(ids, -logits)

    monkeypatch.setattr("sae_lens_dfc.models.loading.computed", another)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The cat sat on the mat."}))
    names = ["--model-a.model-name", str(llama_folder), "--model-b.model-name", str(llama_folder)]
    names += ["--dataset-path", str(tmp_path / "text.jsonl"), "--sae.d-sae", "32", "--sae.k", "4"]
    assert main(["train", *names, "--output-path", str(tmp_path / "run")]) == 1
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(
        f"sae-lens-dfc: error: TransformerLens does not compute what model '{llama_folder}' computes in transformers: "
    )
    assert said.endswith('Give another; the docs\' page "Which models?" lists those that work.')


def test_a_model_that_transformer_lens_does_not_know_is_refused_without_naming_all_it_knows(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    config = PersimmonConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    PersimmonForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is a PersimmonForCausalLM, which") as refused:
        load_model(ModelConfig(str(tmp_path)))
    assert len(str(refused.value)) < len(str(tmp_path)) + 200
