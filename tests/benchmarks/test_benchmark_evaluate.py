"""The benchmark of evaluating, whole, on two tiny models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluate
from benchmarks.__main__ import main
from benchmarks.evaluate import MEASURES, PAIR, Preset, runs
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from tests.helpers import write_pages


@pytest.fixture(scope="module")
def preset(
    llama_folder: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Preset:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_pages(text, 40)
    demo = DemoConfig(
        model_a=str(llama_folder),
        model_b=str(gpt2_folder),
        dataset=str(text),
        d_sae=64,
        k=6,
        max_unique_pairs=3000,
        training_tokens=16 * 1024,
        eval_pairs=800,
    )
    return Preset(demo, seeds=1, nulls=("self",), downstream_pairs=200)


@pytest.mark.slow
def test_both_architectures_are_measured_on_two_models_and_on_the_null(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluate.PRESETS, "small", preset)
    path = tmp_path / "evaluate.json"
    args = ["evaluate", "--output", str(tmp_path)]
    assert main(args) == 0
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert [(r["case"], r["architecture"], r["seed"]) for r in rows] == list(runs(preset))
    for row in rows:
        assert {"commit", "machine", "versions", "settings", *MEASURES} <= set(row)
        assert 0 < row["explained_variance/a"] < 1
        assert 0 < row["explained_variance/a/se"] < 0.2
        assert row["ratio_to_encoder_product"] > 1 and row["training_seconds"] > 0
        assert (row["kl/a/without_exclusive"] is None) == (row["architecture"] != "dfc")
    # Of one model twice either half tells as much of the other.
    twice = next(r for r in rows if r["case"] == "self")
    assert twice["explained_variance/a"] == pytest.approx(twice["explained_variance/b"], abs=0.05)
    assert {r["case"] for r in rows} == {PAIR, "self"}

    # What is there is not computed again, and what is missing comes out the same.
    kept = [{**rows[0], "training_seconds": -1.0}, *rows[2:]]
    path.write_text(json.dumps(kept))
    assert main(args) == 0
    *again, last = json.loads(path.read_text())
    assert again == kept
    assert {name: last[name] for name in MEASURES} == {name: rows[1][name] for name in MEASURES}


def test_results_of_another_preset_are_refused(preset: Preset, tmp_path: Path) -> None:
    other = replace(preset, downstream_pairs=1)
    row = {"settings": evaluate.settings(runs(other)[0], other)}
    (tmp_path / "evaluate.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="1 results with other settings. Name another --output"):
        evaluate.run_evaluate_benchmark("small", tmp_path)


def test_where_a_model_lies_is_no_setting(preset: Preset) -> None:
    moved = replace(preset, demo=replace(preset.demo, model_a="/elsewhere/tiny-llama"))
    run = runs(preset)[0]
    assert evaluate.settings(run, moved) == evaluate.settings(run, preset)
    other = replace(preset, demo=replace(preset.demo, model_a="/elsewhere/other"))
    assert evaluate.settings(run, other) != evaluate.settings(run, preset)
