import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel, tokenizer_sha256
from sae_lens_dfc.models.loading import load_model
from tests.model_classes import MODEL_CLASSES, needs_hooked_transformer


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def llama(request: Any, llama_config: ModelConfig) -> HookedModel:
    return load_model(replace(llama_config, model_class_name=request.param))


def test_both_classes_give_the_activations_of_hugging_face(
    llama: HookedModel, llama_folder: Path
) -> None:
    ids = torch.tensor([[0, 5, 9, 30, 77]])
    hf = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    # hidden_states[0] is the embedding, so block 1's output is [2].
    expected = hf(ids, output_hidden_states=True).hidden_states[2]
    acts = llama.activations(ids, torch.ones_like(ids))
    torch.testing.assert_close(acts, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_a_chat_template_comes_from_the_configuration_or_a_file_it_names(
    llama_config: ModelConfig, class_name: Any, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        cfg = replace(llama_config, model_class_name=class_name, chat_template=given)
        assert load_model(cfg).tokenizer.chat_template == template
    assert load_model(llama_config).tokenizer.chat_template is None


def test_a_chat_template_that_is_neither_template_nor_file_is_refused(
    llama_config: ModelConfig,
) -> None:
    with pytest.raises(ValueError, match=r"chat_template='chatml' is neither a Jinja template"):
        load_model(replace(llama_config, chat_template="chatml"))


def test_padding_changes_no_activation(llama: HookedModel) -> None:
    short, long = torch.tensor([[0, 5, 9]]), torch.tensor([[0, 8, 3, 7, 7, 2]])
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate((short, long)):
        ids[i, : row.shape[1]] = row
        mask[i, : row.shape[1]] = 1
    batch = llama.activations(ids, mask)
    torch.testing.assert_close(batch[0, :3], llama.activations(short, torch.ones(1, 3).long())[0])
    torch.testing.assert_close(batch[1], llama.activations(long, torch.ones(1, 6).long())[0])


def test_the_forward_pass_stops_at_the_hook(llama: HookedModel) -> None:
    ran: list[str] = []
    last_block = "blocks.2.hook_resid_post"
    with llama.model.hooks(fwd_hooks=[(last_block, lambda _, hook: ran.append(hook.name))]):
        llama.activations(torch.tensor([[0, 1]]), torch.ones(1, 2).long())
        assert ran == []
        llama.model(torch.tensor([[0, 1]]))
        assert len(ran) == 1


@pytest.mark.first_is_fast
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_layers_above_the_hook_are_dropped_when_asked(
    llama_config: ModelConfig, class_name: Any, layer: int
) -> None:
    hook_name = f"blocks.{layer}.hook_resid_post"  # the last, and one before
    cfg = replace(llama_config, model_class_name=class_name, hook_name=hook_name)
    whole, dropped = load_model(cfg), load_model(replace(cfg, drop_unused_layers=True))
    ids = torch.tensor([[0, 5, 9, 30]])
    mask = torch.ones_like(ids)
    assert torch.equal(dropped.activations(ids, mask), whole.activations(ids, mask))
    # Both describe themselves alike, because a crosscoder trained on one is used on the other.
    assert dropped.describe() == whole.describe()


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_a_dropped_layer_takes_no_memory(llama_config: ModelConfig, class_name: Any) -> None:
    cfg = replace(llama_config, model_class_name=class_name, hook_name="blocks.0.hook_resid_post")
    model = load_model(cfg)
    first, last, unembed = model.model.blocks[0], model.model.blocks[2], model.model.unembed
    model.drop_unused_layers()
    assert all(p.numel() > 0 for p in first.parameters())
    assert sum(p.numel() for part in (last, unembed) for p in part.parameters()) == 0


def test_autocast_runs_the_model_in_bfloat16(llama_config: ModelConfig) -> None:
    model = load_model(llama_config)
    ids = torch.tensor([[0, 5, 9, 30]])
    mask = torch.ones_like(ids)
    plain = model.activations(ids, mask)
    model.autocast = True
    rounded = model.activations(ids, mask)
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded.float(), plain, atol=0.02, rtol=0.02)


def test_an_object_already_loaded_is_taken_as_it_is(llama: HookedModel) -> None:
    again = HookedModel(llama.model, "blocks.0.hook_mlp_out")
    assert (again.d_model, again.n_layers, again.weight_processing) == (16, 3, "none")


def test_a_hook_with_a_head_axis_is_flattened(llama: HookedModel) -> None:
    model = HookedModel(llama.model, "blocks.1.attn.hook_z")
    ids = torch.tensor([[0, 5, 9]])
    assert model.d_model == 16
    assert model.activations(ids, torch.ones_like(ids)).shape == (1, 3, 16)


def test_no_hook_means_the_middle_block(llama: HookedModel) -> None:
    assert HookedModel(llama.model).hook_name == "blocks.1.hook_resid_post"


def test_a_loaded_model_is_put_in_eval_mode(llama: HookedModel) -> None:
    llama.model.train()
    assert not HookedModel(llama.model).model.training


def test_a_tokenizer_without_bos_starts_contexts_without_one(
    llama_config: ModelConfig, llama_folder: Path, tmp_path: Path
) -> None:
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_model(replace(llama_config, model_name=str(tmp_path)))
    assert model.bos_ids == ()
    # TransformerLens has by now made one up; as an object, the model is still known not to embed
    # it.
    assert HookedModel(model.model).bos_ids == ()


def test_a_device_that_is_not_there_is_an_error(llama_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="device 'cuda:77' is not available"):
        load_model(replace(llama_config, device="cuda:77"))


def test_a_slow_tokenizer_is_refused(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llama.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="cannot map tokens back to characters"):
        HookedModel(llama.model)


def test_an_unknown_hook_is_named_with_the_valid_range(llama: HookedModel) -> None:
    with pytest.raises(
        ValueError,
        match=r"Hook 'blocks.7.hook_resid_post' is not in model .* \(3 layers: blocks.0 to blocks.2\). Close: "
        r"[^ ]+, [^ ]+, [^ ]+\. The output of a middle block is blocks.1.hook_resid_post\.",
    ):
        HookedModel(llama.model, "blocks.7.hook_resid_post")


@pytest.mark.filterwarnings("ignore:run_with_cache. skipped")
def test_a_hook_to_which_no_forward_pass_comes_is_refused(llama_config: ModelConfig) -> None:
    # TransformerLens has these for settings that split a block's input, which are off.
    cfg = replace(llama_config, hook_name="blocks.1.hook_mlp_in")
    with pytest.raises(
        ValueError,
        match=r"is never reached in its forward pass. .* such as blocks.1.hook_resid_post",
    ):
        load_model(cfg)


def test_a_hook_without_one_vector_a_token_is_refused(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="not one vector for each token"):
        HookedModel(llama.model, "blocks.1.attn.hook_pattern")


def test_a_model_without_tokenizer_is_refused(llama_folder: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = TransformerBridge.boot_transformers(str(llama_folder), hf_model=hf, device="cpu")
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        HookedModel(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "A model has no name"),
        ("/nowhere/at-all", "Could not load a tokenizer from '/nowhere/at-all'"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_to_give(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig(name))


def test_a_folder_without_weights_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    for file in llama_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="Could not load model .*Give a hub name, a folder"):
        load_model(ModelConfig(str(tmp_path)))


@pytest.mark.slow
def test_fingerprint_survives_a_change_of_number_format_and_tells_weights_apart(
    llama_config: ModelConfig, llama_folder: Path, tmp_path: Path
) -> None:
    original = load_model(llama_config).describe()
    assert load_model(replace(llama_config, dtype="bfloat16")).describe() == original
    hf = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        hf.model.layers[2].mlp.up_proj.weight += 0.01
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hf.save_pretrained(tmp_path)
    changed = load_model(ModelConfig(str(tmp_path), llama_config.hook_name)).describe()
    assert {key for key in original if original[key] != changed[key]} == {
        "model_name",
        "weights_sha256",
    }


def test_weight_processing_is_told_apart(llama_config: ModelConfig) -> None:
    model = load_model(llama_config).model
    assert isinstance(model, TransformerBridge)
    model.enable_compatibility_mode(disable_warnings=True)
    assert HookedModel(model, "blocks.1.hook_resid_post").weight_processing == "compatibility_mode"


@needs_hooked_transformer
def test_folded_weights_are_told_apart(llama_config: ModelConfig) -> None:
    from transformer_lens import HookedTransformer

    model = load_model(replace(llama_config, model_class_name="HookedTransformer")).model
    assert isinstance(model, HookedTransformer)
    model.process_weights_(fold_ln=True, center_writing_weights=False)
    assert HookedModel(model, "blocks.1.hook_resid_post").weight_processing == "folded"


def test_tokenizer_fingerprint_ignores_padding_settings(llama_config: ModelConfig) -> None:
    tokenizer = load_model(llama_config).tokenizer
    before = tokenizer_sha256(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer("a b", padding="max_length", max_length=9, return_tensors="pt")
    assert tokenizer_sha256(tokenizer) == before


def test_a_model_prints_on_one_line(model: HookedModel) -> None:
    assert "\n" not in repr(model) and model.hook_name in repr(model)


def test_a_folder_without_a_tokenizer_is_refused_by_that_reason(
    llama_folder: Path, tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / file, tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds none\. Copy tokenizer\.json"):
        load_model(ModelConfig(str(tmp_path)))
