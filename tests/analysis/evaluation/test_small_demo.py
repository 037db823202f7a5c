"""The demo on two tiny models, so that it fits the fast lane; test_demo.py has that of the real
ones."""

import json
from pathlib import Path

from sae_lens_dfc.cli.main import main
from tests.helpers import write_pages

SMALL = [
    *("--max-unique-pairs", "2000", "--training-tokens", "40960", "--eval-pairs", "600"),
    *("--d-sae", "64", "--k", "8"),
]


def test_a_small_demo_measures_beside_its_baselines_and_null_and_reports_both_models(
    tmp_path: Path, llama_folder: Path, gpt2_folder: Path
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.jsonl"
    write_pages(text)
    models = ["--model-a", str(llama_folder), "--model-b", str(gpt2_folder)]
    assert main(["demo", *models, *SMALL, "--dataset", str(text), "--output", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["max_forbidden_weight"] == metrics["null/self/max_forbidden_weight"] == 0
    for model in ("a", "b"):
        key = f"explained_variance/{model}"
        assert 0 < metrics[key] < 1 and {f"baseline/batchtopk/{key}", f"null/self/{key}"} <= set(
            metrics
        )
        assert 0.2 < metrics[f"alignment/coverage_{model}"] < 1
    page = (run / "report.html").read_text()
    assert "tiny-llama" in page and "tiny-gpt2" in page
