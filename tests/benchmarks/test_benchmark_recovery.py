"""The recovery benchmark, its small preset whole."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.provenance import provenance
from benchmarks.recovery import (
    PRESETS,
    Run,
    row,
    run_benchmark,
    runs,
    toy_config,
)
from sae_lens_dfc import ToyPair

ARCHITECTURES = {
    "standard_crosscoder",
    "batchtopk_crosscoder",
    "dsf_crosscoder",
    "delta_crosscoder",
    "dfc",
    "dfc-reassigned",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    args = ["recovery", "--preset", "small", "--output", str(folder), "--jobs", "1"]
    assert main(args) == 0
    return folder


@pytest.fixture
def rows(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "recovery.json").read_text())


@pytest.mark.slow
def test_every_architecture_is_measured_at_each_size_noise_and_on_the_null(
    rows: list[dict[str, Any]],
) -> None:
    for name in ARCHITECTURES:
        own = [r for r in rows if r["architecture"] == name]
        assert sorted(r["d_sae"] for r in own if not r["null"] and not r["pairing_noise"]) == (
            [26, 64, 128]
        )
        assert [r["pairing_noise"] for r in own if r["pairing_noise"]] == [0.3]
        assert [r["null"] for r in own].count(True) == 1


@pytest.mark.slow
def test_each_row_has_its_measures_and_says_how_to_get_it_again(
    rows: list[dict[str, Any]],
) -> None:
    for r in rows:
        assert {"seed", "commit", "machine", "versions", "settings"} <= set(r)
        assert r["settings"]["toy"]["seed"] == r["seed"]
        assert 0 < r["training_seconds"] < r["seconds"] + 1
        assert 0.3 < r["explained_variance/a"] < 1 and 0.3 < r["explained_variance/b"] < 1
        assert 0 <= r["shared_recall"] <= 1
        assert (r["exclusive_recall"] is None) == r["null"]
        if r["exclusive_called"]:
            assert r["exclusive_precision"] + r["false_exclusive_rate"] == pytest.approx(1)
    best = max(r["exclusive_recall"] for r in rows if not r["null"])
    assert best > 0.3  # something is found, even in a small run


@pytest.mark.slow
def test_the_table_and_the_picture_show_every_case(output: Path) -> None:
    text = (output / "recovery.md").read_text()
    assert text.count("**") == 2 * 7  # overview, three sizes, one noise level, frequencies, null
    picture = ET.parse(output / "recovery.svg").getroot()
    # Four panels of nine or six lines each, with their error bars.
    lines = [e for e in picture.iter() if "LineCollection" in e.get("id", "")]
    assert len(lines) >= 4 * 6


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_missing_comes_out_the_same(
    output: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = output / "recovery.json"
    lost = next(i for i, r in enumerate(rows) if r["architecture"] == "dfc-reassigned")
    kept = [r for i, r in enumerate(rows) if i != lost]
    kept[0]["seconds"] = -1.0  # a mark: a row that was kept is not touched
    path.write_text(json.dumps(kept))
    assert main(["recovery", "--output", str(output), "--jobs", "1"]) == 0
    again = json.loads(path.read_text())
    assert again[0]["seconds"] == -1.0
    same = [name for name in rows[lost] if name not in ("seconds", "training_seconds", "commit")]
    assert [again[lost][name] for name in same] == [rows[lost][name] for name in same]
    assert "dfc-reassigned" in capsys.readouterr().out


def test_a_file_that_is_no_result_or_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recovery.json"
    args = ["recovery", "--output", str(tmp_path)]
    path.write_text("{}")
    assert main(args) == 1
    path.write_text(json.dumps([{"architecture": "dfc", "settings": {}}]))
    assert main(args) == 1
    assert "1 results with other settings" in capsys.readouterr().err
    assert main([*args, "--jobs", "0"]) == 1
    assert "jobs must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_trained_on_wrong_pairs_is_measured_on_right_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[float, int]] = []
    batches = ToyPair.batches

    def watched(pair: ToyPair, batch_size: int, seed: int = 0) -> Any:
        made.append((pair.cfg.pairing_noise, seed))
        return batches(pair, batch_size, seed)

    monkeypatch.setattr(ToyPair, "batches", watched)
    row(Run("small", "batchtopk_crosscoder", 0.4, 3, 0.3, False))
    assert made == [(0.3, 3), (0.0, 2_000_000), (0.0, 1_000_000)]


def test_one_failure_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Run("small", "no such crosscoder", 0.4, seed, 0.0, False) for seed in range(3)]
    monkeypatch.setattr("benchmarks.recovery.runs", lambda _: wanted)
    with pytest.raises(KeyError, match="no such crosscoder"):
        run_benchmark("small", tmp_path / "recovery.json", jobs=1)


def test_outside_a_repository_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert provenance()["commit"] is None


def test_the_processor_is_named_where_the_system_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("benchmarks.provenance.CPU_INFO", info)
    assert provenance()["cpu"] is None
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 9 @ 2 GHz\nmodel name\t: Some\n")
    assert provenance()["cpu"] == "Some CPU: 9 @ 2 GHz"


def test_the_null_has_as_many_features_and_none_exclusive() -> None:
    (null,) = (r for r in runs("small") if r.null and r.name == "dfc")
    sizes = toy_config(null).features.sizes
    assert sizes == {"a_exclusive": 0, "b_exclusive": 0, "shared": PRESETS["small"].toy.n_features}


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed() -> None:
    run = Run("small", "batchtopk_crosscoder", 0.4, 3, 0.0, False)
    one, again = row(run), row(run)
    assert one["explained_variance/a"] == again["explained_variance/a"]
