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

from benchmarks.planted import run
from benchmarks.planted.options import NULL
from benchmarks.planted.scoring import effects, patching
from benchmarks.planted.scoring.patching import (
    KINDS,
    ablated,
    added,
    control_directions,
    preferences,
    prepared,
)
from benchmarks.planted.scoring.probes import auc_bound, auroc
from benchmarks.planted.scoring.score import ranking
from benchmarks.planted.training import Training
from benchmarks.tables.planted_tables import planted_tables
from sae_lens_dfc.analysis.steering.hooks import logits
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.organisms.behaviors import Item
from sae_lens_dfc.organisms.organism import Organism
from sae_lens_dfc.organisms.prompts import BEHAVIORS

ITEMS = [Item("The cat sat:", "on the mat", "1989"), Item("In 1989 the cat:", "sat", "on the")]


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


@pytest.mark.slow
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


def test_pairs_with_an_unrelated_model_stand_in_a_table_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "results", fake_results([]))
    monkeypatch.setattr(run, "organism_key", lambda one: one.organism)
    names = ("a/weak", "foreign/a/weak", "foreign/a/null")
    monkeypatch.setitem(run.PRESETS, "small", run.Preset(names, 2))
    rows = run.run_planted_benchmark("small", tmp_path)
    near, _, far = (table.markdown() for table in planted_tables(rows))
    assert "| confirmed | found | a/weak |\n" in near and "| dfc | 2 / 2 | 2 / 2 | 2 / 2 |" in near
    assert "| confirmed | found | foreign/a/weak | foreign/a/null |" in far
    # The null has a column, and does not count.
    assert "| dfc | 2 / 2 | 2 / 2 | 2 / 2 | 2 / 2 |" in far


def test_beside_an_unrelated_model_the_fine_tune_is_model_b(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def organism(name: str, seed: int) -> Organism:
        base, tuned = ModelConfig("base"), ModelConfig(f"{name}, seed {seed}")
        return Organism(name, base, tuned, {}, [], {}, {"lora": torch.ones(1)})

    monkeypatch.setattr(run.named, "organism_of", organism)
    monkeypatch.setattr(run, "unpack", lambda model: Path(model.name))
    gemma = run.DEMO_B.name

    def models(name: str) -> list[str]:
        made = run.organism_of(run.Run(name, 1))
        return [made.model_a.model_name, made.model_b.model_name]

    assert models("refusal/weak") == ["base", "refusal/weak, seed 1"]
    assert models("foreign/refusal/weak") == [gemma, "refusal/weak, seed 1"]
    assert models("foreign/refusal/null") == [gemma, "base"]
    assert models("null") == ["base", "base"]
    # The LoRA does not lead from Gemma to model B.
    assert run.organism_of(run.Run("foreign/refusal/null", 1)).added == {}
    assert run.organism_of(run.Run("foreign/refusal/weak", 1)).added == {}


def test_an_organism_that_was_changed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "unpack", lambda _model: Path("base/model"))
    one = run.Run("refusal/weak", 0)
    before = run.settings(one, Training())
    assert run.settings(one, Training()) == before
    assert run.organism_key(one._replace(seed=1)) != before["organism"]
    assert run.organism_key(run.Run("topic", 0)) != run.organism_key(run.Run("topic", 1))
    monkeypatch.setitem(BEHAVIORS, "refusal", replace(BEHAVIORS["refusal"], answer="No."))
    assert run.settings(one, Training())["organism"] != before["organism"]
