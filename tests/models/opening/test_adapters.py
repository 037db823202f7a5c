import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.core.parsing import sha256_of
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model, or_base_of
from sae_lens_dfc.models.packaged import DEMO_A, unpack
from tests.helpers import write_pages
from tests.model_classes import MODEL_CLASSES

WEIGHTS = "adapter_model.safetensors"
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def trained(base: Path, config: PeftConfig, folder: Path, seed: int = 0) -> Path:
    """An adapter of `base` whose weights are none of them as they began, saved as PEFT does."""
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder)
    return folder


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **(LORA | settings))


@pytest.fixture
def adapter(llama_folder: Path, tmp_path: Path) -> Path:
    return trained(llama_folder, lora(), tmp_path / "adapter")


def merged_by_peft(
    adapter: Path, base: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()  # type: ignore[operator]


def refusal(folder: str | Path, base: str | None = None) -> str:
    with pytest.raises(ValueError, match=r"Could not load model|adapter") as refused:
        load_model(ModelConfig(str(folder), base=base))
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message


def save_merged(adapter: Path, base: Path, folder: Path, dtype: torch.dtype) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.first_is_fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True, use_dora=True),
        lora(bias="lora_only", modules_to_save=["lm_head"]),
        LoHaConfig(r=4, target_modules=["q_proj"]),
    ],
    ids=["LoRA", "rsLoRA and DoRA", "LoRA with a head and biases", "LoHa"],
)
def test_an_adapter_opens_as_the_bits_of_the_merged_model(
    config: PeftConfig, dtype: str, llama_folder: Path, tmp_path: Path
) -> None:
    adapter = trained(llama_folder, config, tmp_path / "adapter")
    whole = save_merged(adapter, llama_folder, tmp_path / "whole", getattr(torch, dtype))
    opened = load_model(ModelConfig(str(adapter), dtype=dtype))
    merged = load_model(ModelConfig(str(whole), dtype=dtype))
    base = load_model(ModelConfig(str(llama_folder), dtype=dtype))
    ids = torch.tensor([[0, 5, 9, 30, 77]])
    acts = [model.activations(ids, torch.ones_like(ids)) for model in (opened, merged, base)]
    assert torch.equal(acts[0], acts[1])
    assert not torch.equal(acts[0], acts[2])
    same, other = opened.describe(), merged.describe()
    assert same["weights_sha256"] == other["weights_sha256"]
    kind = "LOHA" if isinstance(config, LoHaConfig) else "LORA"
    assert opened.notes[0].startswith(f"Adapter '{adapter}' ({kind}) was merged into ")


def test_what_it_was_merged_from_is_described(adapter: Path, llama_folder: Path) -> None:
    merged_from = {
        "adapter": str(adapter),
        "adapter_revision": None,
        "adapter_sha256": sha256_of(adapter / WEIGHTS),
        "base": str(llama_folder),
        "base_revision": None,
    }
    assert merged_from.items() <= load_model(ModelConfig(str(adapter))).describe().items()
    assert not merged_from.keys() & load_model(ModelConfig(str(llama_folder))).describe().keys()


def test_a_base_that_has_moved_is_named_by_the_caller(
    adapter: Path, llama_folder: Path, tmp_path: Path
) -> None:
    expected = load_model(ModelConfig(str(adapter))).describe()
    moved = tmp_path / "moved"
    shutil.copytree(llama_folder, moved)
    change(adapter, base_model_name_or_path="/home/trainer/llama")
    message = refusal(adapter)
    assert "could not load '/home/trainer/llama', the base of adapter" in message
    assert message.endswith("Say where the base is now as the model's `base`.")
    now = load_model(ModelConfig(str(adapter), base=str(moved))).describe()
    assert now["weights_sha256"] == expected["weights_sha256"]
    change(adapter, base_model_name_or_path=None)
    assert "names no base model" in refusal(adapter)


def change(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))


def rewrite(adapter: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(dict(weights), adapter / WEIGHTS, {"format": "pt"})


def test_the_tokenizer_is_the_adapters_where_it_has_one(adapter: Path, llama_folder: Path) -> None:
    plain = load_model(ModelConfig(str(adapter)))
    assert plain.tokenizer.chat_template is None
    tokenizer: Any = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    assert load_model(ModelConfig(str(adapter))).tokenizer.chat_template is not None


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_tokens_that_the_adapter_added_have_its_embeddings(
    class_name: Any, llama_folder: Path, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(llama_folder)
    n_before = len(tokenizer)
    tokenizer.add_tokens(["<|eiffel|>", "<|rome|>"])
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.resize_token_embeddings(len(tokenizer))
    adapted: Any = get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        adapted.base_model.model.model.embed_tokens.modules_to_save.default.weight.normal_()
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    expected = adapted.merge_and_unload().get_input_embeddings().weight
    opened = load_model(ModelConfig(str(folder), model_class_name=class_name))
    assert opened.model.cfg.d_vocab == n_before + 2
    assert opened.tokenizer("<|rome|>", add_special_tokens=False)["input_ids"] == [n_before + 1]
    ids = torch.tensor([[n_before, n_before + 1, 3]])
    opened.hook_name = "hook_embed"
    assert torch.equal(opened.activations(ids, torch.ones_like(ids))[0], expected[ids[0]])


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
    ],
    ids=["PROMPT_TUNING", "PREFIX_TUNING"],
)
def test_an_adapter_of_prompts_is_refused(
    config: PeftConfig, llama_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = trained(llama_folder, config, tmp_path / "adapter")
    kind = request.node.callspec.id
    assert f"is {kind}, which changes what the model reads and none of its weights" in refusal(
        str(folder)
    )


def test_a_quantized_base_is_refused_before_it_is_read(
    adapter: Path, llama_folder: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized"
    shutil.copytree(llama_folder, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    message = refusal(adapter, base=str(quantized))
    assert "whose weights are quantized. Give the same model unquantized" in message


def test_an_adapter_of_another_base_is_refused(adapter: Path, gpt2_folder: Path) -> None:
    message = refusal(adapter, base=str(gpt2_folder))
    assert f"adapter '{adapter}' does not fit its base '{gpt2_folder}': " in message
    assert message.endswith(
        "Give the causal language model that it was trained on as the model's `base`."
    )


def test_an_adapter_of_a_base_of_another_width_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    rewrite(adapter, {k: v[:, :8].contiguous() if "lora_A" in k else v for k, v in weights.items()})
    message = refusal(adapter)
    assert "does not fit its base" in message and "size mismatch" not in message
    assert "lora_A.weight is [4, 8] and would be [4, 16], " in message


def test_an_adapter_of_another_rank_than_its_config_says_names_both(adapter: Path) -> None:
    change(adapter, r=8)
    message = refusal(adapter)
    assert re.search(r"it has \d+ weights \(base_model\.model\.model\.layers\.0\.", message)
    assert re.search(r"lora_A.weight is \[4, (\d+)\] and would be \[8, \1\]", message)
    assert "Is that file the one that was saved with the weights?" in message


def test_an_adapter_in_a_subfolder_is_hinted_at(adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter, tmp_path / "repository" / "epoch-3")
    folder = str(tmp_path / "repository")
    for wrong in (None, "epoch-4"):
        with pytest.raises(ValueError, match="an adapter in 'epoch-3'. Name its folder as the"):
            load_model(ModelConfig(folder, adapter_subfolder=wrong))
    assert load_model(ModelConfig(folder, adapter_subfolder="epoch-3")).merged is not None


def test_an_adapter_that_names_itself_as_its_base_is_refused(adapter: Path) -> None:
    change(adapter, base_model_name_or_path=str(adapter))
    assert "names itself as its base" in refusal(adapter)


def test_an_adapter_that_lacks_weights_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    rewrite(adapter, {k: v for k, v in weights.items() if not ("lora_B" in k and ".1." in k)})
    assert "it lacks 3 weights (base_model.model.model.layers.1." in refusal(adapter)


def test_an_adapter_with_weights_that_the_base_has_no_place_for_is_refused(
    llama_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(llama_folder)
    folder = tmp_path / "classifier"
    get_peft_model(classifier, LoraConfig(task_type=TaskType.SEQ_CLS, **LORA)).save_pretrained(
        str(folder)
    )
    assert "the base has no place for 1 weight (base_model.model.score" in refusal(folder)


def test_an_adapter_without_its_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    assert f"has an adapter_config.json and no {WEIGHTS}" in refusal(adapter)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin.index.json"])
def test_a_folder_with_an_adapter_and_a_whole_model_is_refused(
    weights: str, adapter: Path, llama_folder: Path
) -> None:
    shutil.copy(llama_folder / "model.safetensors", adapter / weights)
    assert "holds both a whole model and an adapter" in refusal(adapter)


def test_a_base_for_a_whole_model_is_refused(llama_folder: Path) -> None:
    assert "is for an adapter, and" in refusal(llama_folder, base="some/base")


def test_without_peft_it_is_said_how_to_install_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert refusal(adapter).endswith("Install it: pip install 'sae-lens-dfc[peft]'.")


def test_a_bare_adapter_is_compared_with_its_base(adapter: Path, llama_folder: Path) -> None:
    hook, dtype = "blocks.0.hook_resid_post", "bfloat16"
    model_b = ModelConfig(str(adapter), hook, dtype=dtype)
    assert or_base_of(ModelConfig(), model_b) == ModelConfig(str(llama_folder), hook, dtype=dtype)
    read_elsewhere = ModelConfig(hook_name="blocks.2.hook_resid_post")
    assert or_base_of(read_elsewhere, model_b) == replace(
        read_elsewhere, model_name=str(llama_folder)
    )


@pytest.mark.slow
def test_a_check_of_a_bare_adapter_looks_at_its_base(
    adapter: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(json.dumps({"text": page}) for page in reference_pages()[:4])
    (tmp_path / "text.jsonl").write_text(text)
    sizes = "--d-sae 64 --k 4 --training-tokens 1280 --train-batch-size-tokens 64"
    args = ["check", "--model-b", str(adapter), "--dataset", str(tmp_path / "text.jsonl")]
    status = main([*args, *sizes.split(), "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    found = json.loads(printed.out)
    assert found["models"]["a"]["name"] == llama_folder.name
    assert found["basis"]["is_shared"] and found["basis"]["median_cosine"] < 1
    assert found["one_tokenizer"]


def test_a_base_that_is_not_here_is_named_with_its_adapter_though_nobody_named_it(
    adapter: Path,
) -> None:
    gone = "/home/user/base"
    change(adapter, base_model_name_or_path=gone)
    model_b = ModelConfig(str(adapter))
    with pytest.raises(ValueError, match=r"--model-b\.base") as refused:
        ModelPair.load(or_base_of(ModelConfig(), model_b), model_b)
    assert f"Could not load '{gone}', the base of adapter '{adapter}': " in str(refused.value)


@pytest.mark.parametrize("values", [{"peft_type": "FUTURE"}, {"peft_type": None}])
def test_an_adapter_of_a_kind_that_peft_does_not_know_is_refused_by_that_reason(
    adapter: Path, values: dict[str, Any]
) -> None:
    change(adapter, **values)
    assert "that peft" in (message := refusal(adapter)) and "cannot read" in message


def test_a_hub_adapter_that_cannot_be_read_may_be_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sae_lens_dfc.models.opening.adapters.find_adapter_config_file", lambda *_, **__: None
    )
    assert "check that the hub can be reached" in refusal("user/adapter", base="some/base")


def test_a_whole_model_needs_a_model_a(llama_folder: Path) -> None:
    named = ModelConfig("somewhere")
    assert or_base_of(named, ModelConfig(str(llama_folder))) is named
    assert or_base_of(ModelConfig(), ModelConfig(str(llama_folder))) == ModelConfig()


@pytest.mark.slow
def test_one_command_leads_from_an_adapter_to_a_report(
    adapter: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    write_pages(text, 20)
    output = tmp_path / "demo"
    args = ["--model-b", adapter, "--dataset", text, "--output", output, "--dtype", "float32"]
    sizes = "--d-sae 64 --k 8 --max-unique-pairs 4000 --training-tokens 8192 --eval-pairs 1000"
    assert main(["demo", *map(str, args), *sizes.split()]) == 0
    assert (output / "report.html").is_file()
    cfg = json.loads((output / "runner_cfg.json").read_text())
    assert cfg["model_a"]["model_name"] == str(llama_folder)
    metadata = json.loads((output / "cfg.json").read_text())["metadata"]
    assert "adapter" not in metadata["model_a"]
    assert metadata["model_b"]["adapter_sha256"] == sha256_of(adapter / WEIGHTS)
    # The merged model alone is enough to evaluate the run.
    merged = save_merged(adapter, llama_folder, tmp_path / "merged", torch.float32)
    capsys.readouterr()
    assert main(["evaluate", str(output), "--model-b", str(merged), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measured


@pytest.mark.slow
def test_one_command_leads_from_an_adapter_of_a_real_model_to_a_report(tmp_path: Path) -> None:
    base = unpack(DEMO_A)
    adapter = taught(base, tmp_path / "adapter")
    text, output = tmp_path / "text.jsonl", tmp_path / "demo"
    write_pages(text, 20)
    args = ["--model-b", adapter, "--dataset", text, "--output", output, "--dtype", "float32"]
    sizes = "--d-sae 64 --k 8 --max-unique-pairs 600 --training-tokens 2048 --eval-pairs 200"
    assert main(["demo", *map(str, args), *sizes.split()]) == 0
    assert "<html" in (output / "report.html").read_text()
    metadata = json.loads((output / "cfg.json").read_text())["metadata"]
    assert metadata["model_a"]["model_name"] == base.name
    assert metadata["model_b"]["base"] == str(base)
    # The same merged by PEFT, and saved.
    whole = save_merged(adapter, base, tmp_path / "merged", torch.float32)
    hook = metadata["model_b"]["hook_name"]
    ids = torch.tensor([[1, *range(500, 540)]])
    acts = [
        load_model(ModelConfig(str(folder), hook)).activations(ids, torch.ones_like(ids))
        for folder in (adapter, whole, base)
    ]
    assert torch.equal(acts[0], acts[1])
    assert not torch.equal(acts[0], acts[2])


def taught(base: Path, folder: Path) -> Path:
    """An adapter of a real model after three steps of training on one text."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = get_peft_model(model, lora())
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(reference_pages()[0][:300], return_tensors="pt")["input_ids"]
    learnt = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, 1e-2)
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_training_caching_and_answering_take_an_adapter(
    adapter: Path, llama_folder: Path, tmp_path: Path
) -> None:
    text, prompts = tmp_path / "text.jsonl", tmp_path / "prompts.jsonl"
    write_pages(text, 12)
    prompts.write_text(json.dumps({"prompt": "The sky is"}))
    model_b = ["--model-b.model-name", str(adapter)]
    data = ["--dataset-path", str(text), "--context-size", "48", "--eval-every-n-documents", "4"]
    cache, run = tmp_path / "cache", tmp_path / "run"
    small = "--training-tokens 640 --train-batch-size-tokens 64 --sae.d-sae 64 --sae.k 6"
    assert main(["cache", *model_b, *data, "--cache-path", str(cache)]) == 0
    on_cache = ["--cache-path", str(cache), "--output-path", str(run / "cached")]
    assert main(["train", *model_b, *on_cache, *small.split()]) == 0
    live = ["--output-path", str(run / "live")]
    assert main(["train", *model_b, *data, *live, *small.split()]) == 0
    for kind in ("cached", "live"):
        models = json.loads((run / kind / "runner_cfg.json").read_text())
        assert models["model_a"]["model_name"] == str(llama_folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    templates = ["--model-a.chat-template", template, "--model-b.chat-template", template]
    answers = tmp_path / "answers.jsonl"
    to = ["--prompts", str(prompts), "--output", str(answers), "--max-new-tokens", "3"]
    assert main(["generate", *model_b, *templates, *to]) == 0
    steer = ["--model", "b", "--latent", "63", "--strength", "1", "--prompt", "The", "--raw-prompt"]
    assert main(["steer", str(run / "live"), *steer, "--max-new-tokens", "3"]) == 0
    assert main(["screen", str(run / "live"), "--output", str(tmp_path / "screen")]) == 0
