"""The demo's two real models, with so little text that it fits the fast lane; test_demo.py has the
rest."""

import json
from pathlib import Path

from sae_lens_dfc.cli.main import main

SMALL = [
    *("--max-unique-pairs", "2000", "--training-tokens", "8192", "--eval-pairs", "600"),
    *("--d-sae", "128", "--k", "16"),
]


def test_a_small_demo_measures_beside_its_baselines_and_null_and_reports_both_models(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    assert main(["demo", *SMALL, "--output", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["max_forbidden_weight"] == metrics["null/self/max_forbidden_weight"] == 0
    assert 0.88 < metrics["alignment/coverage_a"] < metrics["alignment/coverage_b"] < 1
    for model in ("a", "b"):
        key = f"explained_variance/{model}"
        assert 0 < metrics[key] < 1 and {f"baseline/batchtopk/{key}", f"null/self/{key}"} <= set(
            metrics
        )
    page = (run / "report.html").read_text()
    assert "SmolLM2-135M-Instruct" in page and "Gemma-3-270M" in page
