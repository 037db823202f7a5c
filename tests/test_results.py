"""What benchmarks/README.md says of the committed results is in them."""

import json
from pathlib import Path

from sae_lens_dfc.benchmark.data import TARGETS
from sae_lens_dfc.benchmark.recovery import runs
from sae_lens_dfc.benchmark.tables import tables

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "recovery.json"


def test_the_committed_results_are_the_full_preset_whole() -> None:
    rows = json.loads(COMMITTED.read_text())
    assert len(rows) == len(runs("full"))
    assert all(len(table.cells) > 6 for table in tables(rows))
    assert {r["seed"] for r in rows} == set(range(5))


def test_the_recipe_keeps_the_dfcs_recall_at_half_its_false_exclusive_rate() -> None:
    rows = json.loads(COMMITTED.read_text())
    for d_sae in (154, 384, 768):
        means: dict[str, tuple[float, float]] = {}
        for name in ("dfc", "dfc-tested"):
            own = [
                r
                for r in rows
                if r["architecture"] == name
                and (r["d_sae"], r["pairing_noise"], r["null"]) == (d_sae, 0, False)
            ]
            assert len(own) == 5
            means[name] = (
                sum(r["exclusive_recall"] for r in own) / 5,
                sum(r["false_exclusive_rate"] for r in own) / 5,
            )
        (recall, false), (tested_recall, tested_false) = means["dfc"], means["dfc-tested"]
        assert tested_recall >= recall
        assert tested_false <= false / 2


DATA = json.loads((COMMITTED.parent / "data.json").read_text())


def test_the_datas_way_costs_no_more_than_it_may() -> None:
    assert DATA["preset"] == "full" and DATA["commit"]
    assert DATA["harvest_ratio"] >= 0.85
    assert DATA["alignment_ratio"] <= 0.25
    assert DATA["cache_write_ratio"] >= 0.8
    assert DATA["shuffled_read_ratio"] >= 0.5 and DATA["shuffled_read_ratio_from_disk"] >= 0.5


def test_the_readme_and_the_guide_have_the_measured_figures() -> None:
    root = COMMITTED.parent.parent.parent
    for name in ("README.md", "docs/data.md"):
        text = (root / name).read_text(encoding="utf-8")
        for figure in TARGETS:
            assert f"{DATA[figure]:.2f}" in text, (name, figure)
