"""Public organisms as recipes: each well-formed, and one of each architecture trained on a tiny
stand-in of the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.number_formats import fast_dtype
from sae_lens_dfc.organisms.from_scratch import BOS
from sae_lens_dfc.training.recipes.named import RECIPES, find_recipe
from sae_lens_dfc.training.recipes.organisms import RECIPE_PREFIX, PublicOrganism, organisms
from sae_lens_dfc.training.recipes.settings import recipe_config
from tests.docs_blocks import ROOT
from tests.test_site import hook
from tests.tokenizer_kinds import byte_bpe_english

ON_THE_HUB = r"[\w.-]+/[\w.-]+"
BY_THE_PAPERS_CODE = {"google/gemma-2-2b": 13, "meta-llama/Llama-3.2-1B": 8}
"""Blocks that science-of-finetuning/sparsity-artifacts-crosscoders reads; the toolkit's count would
give 12 and 7."""

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# A recipe of each architecture, and its stand-in's configuration.
FAMILIES: dict[str, Any] = {
    "organism-cake-bake-gemma3-1b": Gemma3TextConfig,
    "organism-taboo-gold-gemma2-9b": Gemma2Config,
    "organism-cake-bake-qwen3-1.7b": Qwen3Config,
    "organism-em-bad-medical-qwen2.5-0.5b": Qwen2Config,
    "organism-persona-sarcasm-llama3.1-8b": LlamaConfig,
    "organism-chat-llama3.2-1b": LlamaConfig,
}


@pytest.mark.parametrize("organism", organisms().values(), ids=lambda one: one.name)
def test_an_organism_says_what_it_is_and_where_that_was_read(organism: PublicOrganism) -> None:
    base = organism.base
    assert re.fullmatch(rf"{RECIPE_PREFIX}[a-z0-9.-]+", organism.name)
    names = [organism.model, base.name, *([organism.dataset] if organism.dataset else [])]
    assert [name for name in names if not re.fullmatch(ON_THE_HUB, name)] == []
    assert organism.source.startswith("https://") and base.source
    assert organism.license and base.license
    assert 1 <= len(organism.behavior.split()) <= 5
    assert organism.subfolder is None or organism.kind == "adapter"


# In one order: tests are dealt out to several processes.
@pytest.mark.parametrize(
    "base", dict.fromkeys(o.base for o in organisms().values()), ids=lambda one: one.name
)
def test_a_base_is_read_where_the_toolkit_reads_it(base: Any) -> None:
    # Its layer 0.5, as src/diffing/utils/activations.py counts.
    assert base.layer == BY_THE_PAPERS_CODE.get(base.name, int(0.5 * (base.n_layers - 1)))


def test_no_two_organisms_are_the_same() -> None:
    pairs = [(o.base.name, o.model, o.subfolder) for o in organisms().values()]
    assert len(set(pairs)) == len(pairs)
    assert not set(organisms()) & set(RECIPES)


@pytest.mark.parametrize("organism", organisms().values(), ids=lambda one: one.name)
def test_a_name_is_all_that_a_configuration_needs(organism: PublicOrganism) -> None:
    cfg = recipe_config(organism.name)
    assert find_recipe(organism.name).required == {}
    assert (cfg.model_a.model_name, cfg.model_b.model_name) == (organism.base.name, organism.model)
    site = f"blocks.{organism.base.layer}.hook_resid_post"
    assert (cfg.model_a.hook_name, cfg.model_b.hook_name) == (site, site)
    assert cfg.sae.architecture() == "delta_crosscoder"
    assert [source.text_column for source in cfg.all_sources] == [None, "messages"]
    assert cfg.output_path == f"runs/{organism.name}"
    adapter = (organism.base.name, organism.subfolder)
    expected = adapter if organism.kind == "adapter" else (None, None)
    assert (cfg.model_b.base, cfg.model_b.adapter_subfolder) == expected


def test_the_sizes_are_the_papers_for_its_width() -> None:
    # arXiv 2603.04426 has 17,920 latents and 600 active ones on Qwen2.5-7B.
    sae = recipe_config("organism-em-extreme-sports-qwen2.5-7b").sae
    assert sae.d_sae == 17_920
    assert sae.to_dict()["k"] == pytest.approx(600, rel=0.01)


def test_only_a_base_without_a_template_is_given_one() -> None:
    given = {name: recipe_config(name).model_a.chat_template for name in organisms()}
    assert {name for name, template in given.items() if template} == {
        name for name in organisms() if name.startswith(f"{RECIPE_PREFIX}chat-")
    }


def test_a_misspelled_name_is_refused_with_the_close_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--recipe", "organism-cake-bake-gemma-1b"]) == 1
    said = capsys.readouterr().err
    assert (
        "There is no recipe 'organism-cake-bake-gemma-1b'. Close: organism-cake-bake-gemma3-1b,"
        in said
    )


def test_help_says_that_organisms_are_recipes_without_listing_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = re.sub(r"\s+", "", capsys.readouterr().out)
    assert f"{RECIPE_PREFIX}…:apublicmodelanditsbase(docs/how-to/organisms.md)" in said
    assert "cake-bake" not in said


def test_the_page_has_the_table_of_the_file() -> None:
    page = (ROOT / "docs" / "how-to" / "organisms.md").read_text(encoding="utf-8")
    assert hook("organisms").with_table(page) == page, "Run python docs/_hooks/organisms.py."
    assert all(f"`{name}`" in page for name in organisms())


# --- stand-ins ---


def _stand_in(config_class: Any, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe_english(), bos_token=BOS)
    tokenizer.save_pretrained(folder)
    head = {"head_dim": 8} if "head_dim" in config_class.__annotations__ else {}
    config = config_class(**SMALL, **head, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _fine_tune(base: Path, folder: Path) -> None:
    """All of its weights moved a little."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


def _adapter(base: Path, folder: Path) -> None:
    """Of rank 2 on the first block's queries, as PEFT writes one; it names a base that is nowhere,
    as some public ones do."""
    folder.mkdir(parents=True)
    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[0].self_attn.q_proj.weight
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
    }
    config |= {"target_modules": ["q_proj"], "layers_to_transform": [0], "use_rslora": True}
    config |= {"base_model_name_or_path": "nobody/nowhere", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        factors = {
            f"{module}.lora_A.weight": torch.randn(2, weight.shape[1]),
            f"{module}.lora_B.weight": torch.randn(weight.shape[0], 2),
        }
    save_file(factors, folder / "adapter_model.safetensors")


def _text(folder: Path) -> list[dict[str, Any]]:
    """Web text and chats in place of the recipe's, with its columns and weights."""
    pages = reference_pages()[:6]
    chats = [[{"role": r, "content": t[:300]} for r in ("user", "assistant")] for t in pages * 20]
    for name, rows in {
        "text": [{"text": page} for page in pages],
        "chat": [{"messages": chat} for chat in chats],
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    web, chat = find_recipe("organism-cake-bake-gemma3-1b").settings["sources"]
    return [
        {**web, "dataset_path": str(folder / "text.jsonl")},
        {**chat, "dataset_path": str(folder / "chat.jsonl")},
    ]


@pytest.mark.parametrize(
    ("name", "config_class"),
    [
        pytest.param(*of_family, marks=[pytest.mark.slow] if i > 0 else [])
        for i, of_family in enumerate(FAMILIES.items())
    ],
)
def test_a_recipe_trains_on_stand_ins_of_its_architecture(
    name: str, config_class: Any, tmp_path: Path
) -> None:
    organism = organisms()[name]
    a, b, run = tmp_path / "a", tmp_path / "b", tmp_path / "run"
    _stand_in(config_class, a)
    as_adapter = organism.kind == "adapter"
    if as_adapter:
        _adapter(a, b / (organism.subfolder or ""))
    else:
        _fine_tune(a, b)
    site = {"hook_name": "blocks.1.hook_resid_post"}
    # A base that has none takes the recipe's.
    template = {"chat_template": TEMPLATE} if organism.base.has_template else {}
    base = {"base": str(a)} if as_adapter else {}
    changes = {
        "recipe": name,
        "model_a": {"model_name": str(a), **site, **template},
        "model_b": {"model_name": str(b), **site, "chat_template": TEMPLATE, **base},
        "sources": _text(tmp_path),
        "sae": {"d_sae": 40, "k": 4},
        **{"context_size": 48, "training_tokens": 640, "train_batch_size_tokens": 64},
        **{"n_batches_in_buffer": 4, "n_batches_for_norm_estimate": 2, "output_path": str(run)},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", "--config", str(tmp_path / "small.yaml")]) == 0
    settings = json.loads((run / "runner_cfg.json").read_text())
    assert settings["sae"]["delta_loss_coefficient"] == 1
    assert (settings["model_b"]["dtype"], settings["lr"]) == (fast_dtype("cpu"), 1e-4)
    crosscoder = Crosscoder.load_from_disk(run)
    assert (crosscoder.cfg.d_a, crosscoder.cfg.d_b, crosscoder.cfg.d_sae) == (16, 16, 40)
    assert all(torch.isfinite(weight).all() for weight in crosscoder.parameters())
    models = [crosscoder.cfg.metadata[model] for model in ("model_a", "model_b")]
    assert models[0]["weights_sha256"] != models[1]["weights_sha256"]
