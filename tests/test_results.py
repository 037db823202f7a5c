"""What benchmarks/README.md says of the committed results is in them."""

import json
from pathlib import Path

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
