"""The demo's two real models, with so little text that it fits the fast lane; test_demo.py has the
rest."""

import json
from pathlib import Path

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages

SMALL = [
    *("--max-unique-pairs", "800", "--training-tokens", "20480", "--eval-pairs", "300"),
    *("--d-sae", "64", "--k", "8"),
]


def test_a_small_demo_measures_beside_its_baselines_and_null_and_reports_both_models(
    tmp_path: Path,
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.jsonl"
    # A sixth of the demo's text, for which the whole standard library need not be parsed.
    text.write_text("\n".join(json.dumps({"text": page}) for page in reference_pages()))
    assert main(["demo", *SMALL, "--dataset", str(text), "--output", str(run)]) == 0
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
