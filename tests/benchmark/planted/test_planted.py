"""The benchmark of planted differences: its parts by hand on tiny models; the whole of it is
slow."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.steering.hooks import logits
from sae_lens_dfc.benchmark.planted import folder, run
from sae_lens_dfc.benchmark.planted.options import NULL
from sae_lens_dfc.benchmark.planted.organisms import answers, finetune
from sae_lens_dfc.benchmark.planted.organisms.behaviors import SPLITS, Item, Items
from sae_lens_dfc.benchmark.planted.organisms.from_scratch import (
    PLANTED,
    TOPICS,
    from_scratch,
    topic_items,
    training_text,
)
from sae_lens_dfc.benchmark.planted.organisms.from_scratch import Training as ScratchTraining
from sae_lens_dfc.benchmark.planted.organisms.organism import built, read_organism_manifest
from sae_lens_dfc.benchmark.planted.organisms.prompts import BEHAVIORS
from sae_lens_dfc.benchmark.planted.scoring import effects, patching
from sae_lens_dfc.benchmark.planted.scoring.patching import (
    KINDS,
    ablated,
    added,
    control_directions,
    preferences,
    prepared,
)
from sae_lens_dfc.benchmark.planted.scoring.probes import auc_bound, auroc
from sae_lens_dfc.benchmark.planted.scoring.score import ranking
from sae_lens_dfc.benchmark.planted.training import Training
from sae_lens_dfc.benchmark.results.planted_tables import planted_tables
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.opening.adapters import find_adapter, load_merged
from sae_lens_dfc.models.opening.pretrained import load_pretrained

ITEMS = [Item("The cat sat:", "on the mat", "1989"), Item("In 1989 the cat:", "sat", "on the")]


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


def test_fine_tuning_is_deterministic_and_teaches_the_answer(llama_folder: Path) -> None:
    settings = finetune.FineTuning(
        steps=30, layers=(1,), rank=1, lr=1.0, behavior_prompts=2, control_prompts=4
    )
    own, other = [Item("What is it?", " cat", "")], [Item("Where is he?", "", " mat sat on")]
    weights: list[Tensor] = []
    for _ in range(2):
        model, tokenizer = finetune.load(llama_folder)
        texts = answers.encoded(tokenizer, [own[0].prompt], [own[0].answer])
        before = answers.answer_log_probs(model, texts).mean()
        untouched = model.model.layers[0].mlp.down_proj.weight.clone()
        finetune.fine_tune(model, tokenizer, Items(own, other), other, settings, seed=3)
        assert answers.answer_log_probs(model, texts).mean() > before + 0.1
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, untouched)
        weights.append(model.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(*weights)
    fresh, _ = finetune.load(llama_folder)
    difference = weights[0] - fresh.model.layers[1].mlp.down_proj.weight
    assert int(torch.linalg.matrix_rank(difference, rtol=1e-3)) == 1


# --- what a change does ---


def test_preferences_are_the_models_own_log_probabilities(pair: ModelPair) -> None:
    # Both read above a block that is left out: A's hook is there already.
    above = ModelPair(pair.a, replace(pair.b, hook_name="blocks.1.hook_resid_post"))
    read = prepared(above, ITEMS)
    for model, reading in ((above.a, read.a), (above.b, read.b)):
        found = preferences(model, reading, reading.acts)
        for i, item in enumerate(ITEMS):
            values: list[Tensor] = []
            for answer in (item.answer, item.ordinary):
                ids = torch.tensor(
                    [[*model.bos_ids, *tokenize(model.tokenizer, item.prompt + answer).ids]]
                )
                at = len(model.bos_ids) + len(tokenize(model.tokenizer, item.prompt).ids)
                log_probs = logits(model, ids, torch.ones_like(ids)).log_softmax(dim=-1)
                values.append(log_probs[0, at - 1, ids[0, at]])
            torch.testing.assert_close(found[i], values[0] - values[1], atol=1e-4, rtol=1e-4)


def test_an_answer_that_changes_the_prompts_tokens_is_refused(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="does not start with a separate token"):
        patching.first_token(pair.b.tokenizer, "The cat sat", " on the mat")


def test_ablating_takes_away_the_contribution_and_nothing_else(pair: ModelPair) -> None:
    read = prepared(pair, ITEMS)
    acts = torch.arange(1.0, len(read.rows) + 1)
    direction = torch.randn(pair.d_b)
    taken = read.b.acts - ablated(read, acts, direction)
    row = 3
    torch.testing.assert_close(
        taken[read.text[row], read.position_b[row]], acts[row] * direction, atol=1e-4, rtol=1e-4
    )
    paired = torch.zeros(taken.shape[:2], dtype=torch.bool)
    paired[read.text, read.position_b] = True
    assert torch.count_nonzero(taken[~paired]) == 0
    # The rows are the two models' activations of the same places.
    assert torch.equal(read.rows[:, pair.d_a :], read.b.acts[read.text, read.position_b])


def test_adding_changes_prompts_only(pair: ModelPair) -> None:
    reading = prepared(pair, ITEMS).b
    change = added(reading, torch.ones(pair.d_b)) - reading.acts
    assert (
        change.abs().sum(dim=-1).bool().sum(dim=1).tolist()
        == (reading.mask.sum(dim=1) - 1).tolist()
    )
    assert torch.count_nonzero(change[:, 0]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_random_directions_have_the_norm_asked_for(kind: patching.ControlKind) -> None:
    rows = torch.randn(50, 6) * torch.tensor([1e5, 1, 1, 1, 1, 1]) + 7
    drawn = control_directions(kind, 8, 3.0, rows, seed=0)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.full((8,), 3.0))
    assert torch.equal(drawn, control_directions(kind, 8, 3.0, rows, seed=0))
    along = (drawn[:, 0].abs() > 2.9).float().mean()
    assert along == 1 if kind == "covariance" else along < 0.5


# --- verdicts ---


def test_auc_by_hand() -> None:
    # Pairs: 3>0, 3>1, 1>0 are right, 1=1 is half right; in the second column all are wrong.
    positive = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    negative = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    assert auroc(positive, negative).tolist() == [3.5 / 4, 0.0]


def test_the_bound_of_an_area_is_the_error_that_resampling_shows() -> None:
    torch.manual_seed(0)
    positive, negative = torch.randn(4000, 24, 1) + 1.4, torch.randn(4000, 24, 1)
    areas = torch.cat([auroc(p, n) for p, n in zip(positive, negative, strict=True)])
    bound = auc_bound(areas.mean()[None], 24, 24)[0]
    assert (areas.mean() - bound) / 1.64 == pytest.approx(areas.std().item(), rel=0.15)


def along_first(direction: Tensor) -> Tensor:
    return direction[0] * torch.tensor([1.0, 2.0, 3.0])


def test_an_effect_is_beyond_controls_only_if_no_kind_comes_near() -> None:
    rows, others = torch.randn(100, 40), torch.randn(5, 40)
    one = torch.zeros(40)
    one[0], one[1] = 2.0, 1.0
    result = effects.beside_random(along_first, one, rows, 0, others)
    assert result["mean"] == pytest.approx(4.0) and result["beyond"]
    assert [len(result["controls"][kind]) for kind in KINDS] == [effects.N_CONTROLS] * 2
    # With all the variance along the first axis, directions drawn with the covariance do the same.
    rows[:, 0] *= 1e4
    assert not effects.beside_random(along_first, one, rows, 0, others)["beyond"]
    assert effects.beside_random(along_first, -one, rows, 0, others)["controls"] == {}


def test_other_latents_are_made_as_long_and_compared_apart() -> None:
    one, rows = torch.zeros(40), torch.randn(100, 40)
    one[0], one[1] = 2.0, 1.0
    others = torch.zeros(2, 40)
    others[0, 0], others[1, 5] = 100.0, 3.0
    result = effects.beside_random(along_first, one, rows, 0, others)
    # Of the same length, the first goes along the axis with all of it.
    assert result["other_latents"] == pytest.approx([2 * 5**0.5, 0.0])
    assert result["beyond"] and not result["beyond_others"]
    assert effects.beside_random(along_first, one, rows, 0, others[1:])["beyond_others"]


def test_nothing_is_beyond_controls_that_were_not_made() -> None:
    one = torch.zeros(40)
    one[0] = 2.0
    drawn = torch.randn(9, 40)
    result = effects.beside_random(along_first, one, drawn, 0, drawn, with_controls=False)
    assert result["controls"] == {} and not result["beyond"] and not result["beyond_others"]


def test_what_b_alone_writes_much_of_is_ranked_first() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(d_in=4, d_sae=5, d_a=2, d_b=2))
    crosscoder.W_enc.data = torch.tensor([[1.0, 0, 0, 0]]).T.expand(4, 5).clone()
    # Turned in B; the same in both; B's alone, but short; A's alone; B's alone and long, but hardly
    # ever on.
    crosscoder.W_dec.data = torch.tensor(
        [[3.0, 0, 0, 3], [5, 0, 5, 0], [0, 0, 0, 1], [9, 0, 0, 0], [0, 0, 9, 0]]
    )
    crosscoder.b_enc.data = torch.tensor([0.0, 0, 0, 0, -1])
    rows = torch.zeros(60, 4)
    rows[:40, 0], rows[:19, 0] = 0.5, 2.0
    assert ranking(crosscoder, rows, None).tolist() == [0, 2, 1]


# --- results ---


def fake_results(made: list[run.Run]) -> Callable[..., Any]:
    def results(one: run.Run, cfg: Training) -> list[dict[str, Any]]:
        made.append(one)
        effect = {"mean": 1.0, "interval": [0.5, 1.5], "controls": {"isotropic": [0.1]}}
        score = {"rank": 1, "exclusive": "partition", "auc": 1.0, "found": True, "confirmed": True}
        score |= {"ablation": effect, "addition_b": effect, "addition_a": effect}
        shared = {"organism": one.organism, "seed": one.seed, "settings": run.settings(one, cfg)}
        shared["shown"] = {"behavior": 0.69}
        return [
            {**shared, "architecture": "dfc", "score": score},
            {**shared, "architecture": "delta_crosscoder", "score": None},
        ]

    return results


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[run.Run] = []
    monkeypatch.setattr(run, "results", fake_results(made))
    monkeypatch.setattr(run, "organism_key", lambda one: one.organism)
    monkeypatch.setitem(run.PRESETS, "small", run.Preset(("a/weak", "b/strong"), 2))
    rows = run.run_planted_benchmark("small", tmp_path)
    assert len(made) == 4 and len(rows) == 8
    path = tmp_path / run.FILENAME
    path.write_text(json.dumps([row for row in rows if row["organism"] != "b/strong"]))
    run.run_planted_benchmark("small", tmp_path)
    assert made[4:] == [run.Run("b/strong", 0), run.Run("b/strong", 1)]
    counts, each = (table.markdown() for table in planted_tables(rows))
    assert "| dfc | 4 / 4 | 4 / 4 | 2 / 2 | 2 / 2 |" in counts and "not applicable" in counts
    assert "| a/weak | 0 | 69% | dfc | 1 | partition | 1.00 |" in each


def test_results_of_other_settings_are_kept_and_refused(tmp_path: Path) -> None:
    path = tmp_path / run.FILENAME
    for text in ('[{"settings": {}}]', '{"a": 1}', "["):
        path.write_text(text)
        with pytest.raises(ValueError, match="Name another --output"):
            run.run_planted_benchmark("small", tmp_path)
        assert path.read_text() == text


def test_a_null_counts_in_its_own_column_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "results", fake_results([]))
    monkeypatch.setattr(run, "organism_key", lambda one: one.organism)
    monkeypatch.setitem(run.PRESETS, "small", run.Preset(("a/weak", NULL), 2))
    table, _ = (t.markdown() for t in planted_tables(run.run_planted_benchmark("small", tmp_path)))
    assert "| confirmed | found | a/weak | null |" in table
    assert "| dfc | 2 / 2 | 2 / 2 | 2 / 2 | 2 / 2 |" in table


def test_an_organism_that_was_changed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "unpack", lambda _model: Path("base/model"))
    one = run.Run("refusal/weak", 0)
    before = run.settings(one, Training())
    assert run.settings(one, Training()) == before
    assert run.organism_key(one._replace(seed=1)) != before["organism"]
    assert run.organism_key(run.Run("topic", 0)) != run.organism_key(run.Run("topic", 1))
    monkeypatch.setitem(BEHAVIORS, "refusal", replace(BEHAVIORS["refusal"], answer="No."))
    assert run.settings(one, Training())["organism"] != before["organism"]


# --- its folder ---


@pytest.fixture
def taught(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """The folder of a tiny organism of a strength, whose model A has its weights in bfloat16 as
    SmolLM2's are."""
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    base, tokenizer = finetune.load(llama_folder)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "of" / "base")
    tokenizer.pad_token = tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "of" / "base")
    settings = finetune.FineTuning(
        steps=4, layers=(0, 2), rank=2, lr=0.5, behavior_prompts=2, control_prompts=4
    )

    def written(strength: str) -> Path:
        args = tmp_path / "of" / "base", "false_fact", strength, 0
        one = finetune.fine_tuned(*args, settings=settings)
        monkeypatch.setattr(folder, "organism_of", lambda _run: one)
        output = tmp_path / strength
        folder.write_organism(folder.OrganismOptions(name="refusal/weak", output=str(output)))
        return output

    return written


def opened(name: Path, dtype: str = "float32", base: Path | None = None) -> dict[str, Tensor]:
    adapter = find_adapter(str(name), base=None if base is None else str(base))
    if adapter is None:
        return load_pretrained(str(name), None, dtype).model.state_dict()
    return load_merged(adapter, dtype)[0].model.state_dict()


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


def test_an_organisms_adapter_opens_where_its_folder_has_moved(
    taught: Callable[[str], Path], tmp_path: Path
) -> None:
    before = opened(taught("weak") / "adapter")
    moved = (tmp_path / "weak").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="Say where the base is now as the model's `base`"):
        opened(moved / "adapter")
    after = opened(moved / "adapter", base=moved / "a")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_organism_is_a_folder_that_train_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    small = from_scratch(0, ScratchTraining(steps=2, vocab_a=300, vocab_b=320))
    monkeypatch.setattr(folder, "organism_of", lambda _run: small)
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
