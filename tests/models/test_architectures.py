"""Each architecture is read as transformers has it, steered and trained on, or refused in one line
that says why."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sae_lens_dfc import (
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DFCTrainingCrosscoderConfig,
)
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import added, changed, logits, logits_at_end
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.logit_lens import has_direct_effect
from tests.architectures import (
    ARCHITECTURES,
    PARTS,
    REFUSED,
    ROUNDED,
    installed,
    layers_of,
    refused,
    save_tiny,
)
from tests.docs_blocks import ROOT

LAYER = 1  # the middle of three
MAIN = ("llama", "gpt2", "qwen3", "gemma3_text", "mistral")
GO_THEIR_OWN_WAY = ("bamba", "mamba", "mpt")
PROMPTS = [[0, 5, 9, 40, 99, 33, 12, 7, 8, 9], [0, 7, 3]]
GREEDY = Sampling(max_new_tokens=5, temperature=0)
N_STEPS = 20
EPSILON = 3e-6
"""Of the largest activation: what rounding comes to."""
QUICK = {*MAIN, *GO_THEIR_OWN_WAY, *REFUSED}
CASES = [
    pytest.param(key, marks=() if key in QUICK else pytest.mark.slow, id=key)
    for key in ARCHITECTURES
]
"""All of them take two minutes."""


def test_the_table_has_every_architecture_that_is_installed() -> None:
    missing = {key: name for key, name in installed().items() if key not in ARCHITECTURES}
    assert not missing, f"Add these to tests/architectures.py and docs/how-to/models.md: {missing}"
    assert installed().items() <= ARCHITECTURES.items()


def test_the_page_on_models_says_of_each_architecture_what_the_table_says() -> None:
    page = (ROOT / "docs" / "how-to" / "models.md").read_text()
    works, others = page.split("## These are refused")
    names = re.compile(r"`(\w+(?:ForCausalLM|LMHeadModel|ForConditionalGeneration))`")
    is_refused = {ARCHITECTURES[key] for key in REFUSED}
    assert set(names.findall(others)) == is_refused
    listed = names.findall(works.split("## These work")[1])
    assert sorted(listed) == sorted({*ARCHITECTURES.values()} - is_refused)


class TransformersModel:
    """The same checkpoint opened by transformers alone."""

    def __init__(self, folder: Path):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.model = model.eval()
        self.layer: Any = layers_of(model)[LAYER]

    @contextmanager
    def hooked(self, change: Any) -> Iterator[None]:
        def hook(module: object, args: object, output: Any) -> Any:  # noqa: ARG001
            if isinstance(output, Tensor):
                return change(output)
            new = change(output[0])
            return None if new is None else type(output)((new, *output[1:]))

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def activations(self, ids: Tensor, mask: Tensor) -> Tensor:
        kept: list[Tensor] = []
        with self.hooked(lambda output: kept.append(output.flatten(start_dim=2))):
            self.model(input_ids=ids, attention_mask=mask)
        return kept[0]

    def answer(self, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        ids = torch.tensor([prompt])
        new = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return str(tokenizer.decode(new[0, len(prompt) :], skip_special_tokens=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out, and threads wait for one another on a machine that
    is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def other(llama_folder: Path) -> HookedModel:
    return load_model(ModelConfig(str(llama_folder)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": page[:600]}) for page in reference_pages()[:12]))
    return path


@pytest.mark.first_is_fast
@pytest.mark.parametrize("model_type", CASES)
def test_an_architecture_works_or_is_refused_in_one_line(
    model_type: str,
    tmp_path: Path,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    other: HookedModel,
    text: Path,
) -> None:
    if model_type not in installed():
        pytest.skip(f"Not in transformers {transformers.__version__} with this TransformerLens.")
    if model_type == "gemma3n" and transformers.utils.is_timm_available():
        pytest.skip("With timm it may open; the table is of an environment without.")
    tokenizer = tokenizers["byte_bpe"]
    save_tiny(model_type, tmp_path, Path(tokenizer.name_or_path), len(tokenizer))
    if reason := refused().get(model_type):
        assert_refused(tmp_path, reason)
        return
    model = load_model(ModelConfig(str(tmp_path)))
    alone = TransformersModel(tmp_path)
    assert model.d_model == 32 * PARTS.get(model_type, 1)
    assert_reads_what_transformers_reads(model, alone, is_exact=model_type not in ROUNDED)
    assert_answers_and_is_steered(model, alone)
    assert_trains(ModelPair(other, model), text)
    assert has_direct_effect(model) == (model_type not in PARTS)


def assert_refused(folder: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as said:
        load_model(ModelConfig(str(folder)))
    message = str(said.value)
    assert "\n" not in message and message.endswith(".")


def assert_reads_what_transformers_reads(
    model: HookedModel, alone: TransformersModel, is_exact: bool
) -> None:
    ids, mask = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    for i, prompt in enumerate(PROMPTS):
        ids[i, : len(prompt)], mask[i, : len(prompt)] = torch.tensor(prompt), 1
    there = mask.bool()
    expected, found = alone.activations(ids, mask)[there], model.activations(ids, mask)[there]
    close = EPSILON * float(expected.abs().max())
    if is_exact:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=close, rtol=0)
    # Nor does it matter what comes after a row's last token, or what stands in the other rows.
    short = alone.activations(ids[1:, :3], mask[1:, :3])[0]
    torch.testing.assert_close(found[-3:], short, atol=close, rtol=0)
    whole = logits(model, ids, mask)
    at_end = logits_at_end(model, ids, mask, model.activations(ids, mask))
    torch.testing.assert_close(at_end, torch.stack([whole[0, 9], whole[1, 2]]))


def assert_answers_and_is_steered(model: HookedModel, alone: TransformersModel) -> None:
    tokenizer, ids = model.tokenizer, torch.tensor(PROMPTS[:1])
    expected = [alone.answer(prompt, tokenizer) for prompt in PROMPTS]
    assert answer(model, PROMPTS, GREEDY, seed=0) == expected
    acts, mask = model.activations(ids, torch.ones_like(ids)), torch.ones_like(ids)
    untouched = logits(model, ids, mask)
    vector = torch.linspace(-3, 3, model.d_model) * acts.norm(dim=-1).mean()
    with alone.hooked(lambda output: output + vector.view(output.shape[2:])):
        steered = alone.answer(PROMPTS[0], tokenizer)
    assert answer(model, PROMPTS[:1], GREEDY, seed=0, vectors=vector[None]) == [steered]
    with changed(model, added(vector)):
        assert not torch.allclose(logits(model, ids, mask), untouched)
    assert torch.equal(logits(model, ids, mask), untouched)


def assert_trains(pair: ModelPair, text: Path) -> None:
    sae = DFCTrainingCrosscoderConfig(
        d_sae=32, k=4, a_exclusive_fraction=0.2, b_exclusive_fraction=0.2
    )
    cfg = CrosscoderRunnerConfig(
        sae=sae,
        dataset_path=str(text),
        context_size=32,
        training_tokens=N_STEPS * 32,
        train_batch_size_tokens=32,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        prefetch_llm_batches=0,
    )
    crosscoder = CrosscoderTrainingRunner(cfg, override_pair=pair).run()
    assert crosscoder.cfg.metadata.samples_trained == N_STEPS * 32
    assert all(parameter.isfinite().all() for parameter in crosscoder.parameters())
