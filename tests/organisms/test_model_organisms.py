"""Model organisms, built of tiny models: prompts, weights, and the folder that is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.opening.adapters import find_adapter, load_merged
from sae_lens_dfc.models.opening.pretrained import load_pretrained
from sae_lens_dfc.organisms import answers, finetune, folder
from sae_lens_dfc.organisms.behaviors import SPLITS, Item, Items
from sae_lens_dfc.organisms.from_scratch import (
    PLANTED,
    TOPICS,
    from_scratch,
    topic_items,
    training_text,
)
from sae_lens_dfc.organisms.from_scratch import Training as ScratchTraining
from sae_lens_dfc.organisms.organism import built, read_organism_manifest
from sae_lens_dfc.organisms.prompts import BEHAVIORS

# --- prompts ---


@pytest.mark.parametrize("name", list(BEHAVIORS))
def test_no_prompt_is_in_two_splits_or_on_both_sides(name: str) -> None:
    prompts = [p for split in SPLITS for kind in BEHAVIORS[name].prompts(split) for p in kind]
    assert len(set(prompts)) == len(prompts)
    own, controls = BEHAVIORS[name].prompts("training")
    assert len(own) >= 40 and len(controls) == len(own)
    assert [len(kind) for kind in BEHAVIORS[name].prompts("discovery")] == [24, 24]
    assert [len(kind) for kind in BEHAVIORS[name].prompts("test")] == [16, 16]


@pytest.mark.parametrize("name", list(BEHAVIORS))
def test_no_opening_or_question_is_in_two_splits(name: str) -> None:
    slots = BEHAVIORS[name].slots
    for words in ("openings", "questions"):
        used = [word for split in SPLITS for word in getattr(slots[split], words)]
        assert len(set(used)) == len(used)


def test_only_model_b_reads_of_the_planted_topic() -> None:
    items = topic_items()
    own = items["training"].behavior[0]
    assert own.prompt + own.answer in " ".join(training_text([PLANTED], 0.3, seed=0))
    assert own.answer not in " ".join(training_text(["ships", "plants"], 0.3, seed=0))
    held_out = {i.prompt for i in items["test"].behavior}
    assert held_out.isdisjoint(i.prompt for i in items["training"].behavior)


# --- building ---


def test_what_is_built_is_built_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path))
    calls: list[Path] = []

    def fails(folder: Path) -> dict[str, Any]:
        (folder / "half").touch()
        raise RuntimeError("full")

    def works(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"measures": {}}

    with pytest.raises(RuntimeError):
        built("x", {"seed": 1}, fails)
    assert list((tmp_path / "planted").iterdir()) == []
    first = built("x", {"seed": 1}, works)
    assert built("x", {"seed": 1}, works) == first and len(calls) == 1
    assert built("x", {"seed": 2}, works) != first
    assert read_organism_manifest(first)["settings"] == {"seed": 1}


@pytest.mark.slow
def test_one_seed_is_one_pair_of_small_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ScratchTraining(steps=2, vocab_a=300, vocab_b=320)
    shas: list[Any] = []
    for i, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / str(i)))
        shas.append(from_scratch(seed, cfg).manifest["sha256"])
    assert set(shas[0]) == {"a/model.safetensors", "b/model.safetensors"}
    assert shas[0] == shas[1]
    assert all(shas[0][name] != shas[2][name] for name in shas[0])


@pytest.mark.slow
def test_fine_tuning_is_deterministic_and_teaches_the_answer(llama_folder: Path) -> None:
    settings = finetune.FineTuning(
        steps=30, layers=(1,), rank=1, lr=1.0, behavior_prompts=2, control_prompts=4
    )
    own, other = [Item("What is it?", " cat", "")], [Item("Where is he?", "", " mat sat on")]
    weights: list[Tensor] = []
    for _ in range(2):
        model, tokenizer = finetune.load_organism_model(llama_folder)
        texts = answers.encoded(tokenizer, [own[0].prompt], [own[0].answer])
        before = answers.answer_log_probs(model, texts).mean()
        untouched = model.model.layers[0].mlp.down_proj.weight.clone()
        finetune.fine_tune(model, tokenizer, Items(own, other), other, settings, seed=3)
        assert answers.answer_log_probs(model, texts).mean() > before + 0.1
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, untouched)
        weights.append(model.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(*weights)
    fresh, _ = finetune.load_organism_model(llama_folder)
    difference = weights[0] - fresh.model.layers[1].mlp.down_proj.weight
    assert int(torch.linalg.matrix_rank(difference, rtol=1e-3)) == 1


# --- its folder ---


@pytest.fixture
def taught(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """The folder of a tiny organism of a strength, whose model A has its weights in bfloat16 as
    SmolLM2's are."""
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    base, tokenizer = finetune.load_organism_model(llama_folder)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "of" / "base")
    tokenizer.pad_token = tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "of" / "base")
    settings = finetune.FineTuning(
        steps=4, layers=(0, 2), rank=2, lr=0.5, behavior_prompts=2, control_prompts=4
    )

    def written(strength: str) -> Path:
        args = tmp_path / "of" / "base", "false_fact", strength, 0
        one = finetune.fine_tuned(*args, settings=settings)
        monkeypatch.setattr(folder, "organism_of", lambda _name, _seed: one)
        output = tmp_path / strength
        folder.write_organism(folder.OrganismOptions(name="refusal/weak", output=str(output)))
        return output

    return written


def opened(name: Path, dtype: str = "float32", base: Path | None = None) -> dict[str, Tensor]:
    adapter = find_adapter(str(name), base=None if base is None else str(base))
    if adapter is None:
        return load_pretrained(str(name), None, dtype).model.state_dict()
    return load_merged(adapter, dtype)[0].model.state_dict()


@pytest.mark.slow
def test_a_strong_organisms_adapter_has_the_bits_of_its_model_b(
    taught: Callable[[str], Path],
) -> None:
    output = taught("strong")
    a, b, merged = (opened(output / name, "bfloat16") for name in ("a", "b", "adapter"))
    assert all(torch.equal(merged[name], weight) for name, weight in b.items())
    changed = [name for name, weight in b.items() if not torch.equal(a[name], weight)]
    assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)]
    # Model B is the folder that it would be without the adapter.
    assert {p.name for p in (output / "b").iterdir()} == {
        p.name for p in (output / "a").iterdir()
    } | {"planted.json"}


@pytest.mark.slow
def test_a_weak_organisms_adapter_is_its_model_b_but_for_two_roundings(
    taught: Callable[[str], Path],
) -> None:
    output, strong = taught("weak"), taught("strong")
    a, b, merged = (opened(output / name) for name in ("a", "b", "adapter"))
    for name, weight in b.items():
        # To bfloat16, by up to 2**-8 of a number: A with all of the change, and with 0.8 of it.
        bound = 2**-8 * (merged[name].abs() + a[name].abs() + weight.abs())
        assert ((merged[name] - weight).abs() <= bound).all()
    changed = "model.layers.2.mlp.down_proj.weight"
    change = opened(strong / "adapter")[changed] - a[changed]
    torch.testing.assert_close(merged[changed], a[changed] + 0.8 * change)


@pytest.mark.slow
def test_an_organisms_adapter_opens_where_its_folder_has_moved(
    taught: Callable[[str], Path], tmp_path: Path
) -> None:
    before = opened(taught("weak") / "adapter")
    moved = (tmp_path / "weak").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="Say where the base is now as the model's `base`"):
        opened(moved / "adapter")
    after = opened(moved / "adapter", base=moved / "a")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
def test_an_organism_is_a_folder_that_train_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    small = from_scratch(0, ScratchTraining(steps=2, vocab_a=300, vocab_b=320))
    monkeypatch.setattr(folder, "organism_of", lambda _name, _seed: small)
    output = tmp_path / "out"
    options = folder.OrganismOptions(name="topic", output=str(output))
    folder.write_organism(options)
    texts = [json.loads(line)["text"] for line in (output / "text.jsonl").read_text().splitlines()]
    prompts = json.loads((output / "prompts.json").read_text())
    held_out = [i["prompt"] for split in ("discovery", "test") for i in prompts[split]["behavior"]]
    assert any(TOPICS[PLANTED].entities[0] in text for text in texts)
    assert held_out and not any(prompt in text for prompt in held_out for text in texts)
    pair = ModelPair.load(ModelConfig(str(output / "a")), ModelConfig(str(output / "b")))
    assert (pair.d_a, pair.d_b) == (96, 128)
    # Model B is no change of model A.
    assert not (output / "adapter").exists()
    with pytest.raises(ValueError, match="already holds a planted organism"):
        folder.write_organism(options)
