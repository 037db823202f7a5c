"""The data benchmark on two tiny models: what it writes, and that its figures are what they are
called."""

import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data import TARGETS, DataPreset, run_data_benchmark
from benchmarks.timing import figure_rows
from sae_lens_dfc.data.pair import ModelPair


@pytest.fixture
def results(pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    tiny = DataPreset(pairs=600, rounds=2, documents=3, cache_bytes=2**22)
    monkeypatch.setitem(data.DATA_PRESETS, "tiny", tiny)
    return run_data_benchmark("tiny", pair, tmp_path / "out")


@pytest.mark.slow
def test_each_figure_is_written_with_its_range_and_what_made_it(
    results: dict[str, object], tmp_path: Path
) -> None:
    written = json.loads((tmp_path / "out" / "data.json").read_text())
    assert written == json.loads(json.dumps(results))
    for name in TARGETS:
        low, high = written["spread"][name]
        assert 0 < low <= written[name] <= high
    assert {"commit", "machine", "versions", "models", "preset"} <= set(written)
    assert written["models"] == ["tiny-llama", "tiny-gpt2"]
    # The rows that were written to be measured are gone.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.json"]
    # Four windows of sixteen shards: far from the text's order, and not a uniform one.
    assert abs(written["order/rank_correlation"]) < 0.7
    uniform, served, text = (
        written[f"order/{kind}clustering"] for kind in ("uniform/", "", "not_shuffled/")
    )
    assert uniform == pytest.approx(1, abs=0.1) and 10 * uniform < served < text / 10
    assert {row[0] for row in figure_rows(results)} >= set(TARGETS)
