"""The suite with made-up runs: what it writes, what it survives, and what comparing its folders
says."""

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data, evaluate, options, recovery, suite
from benchmarks.__main__ import SUMMARY, main
from benchmarks.evaluate import LARGE_DEMO, MEASURES, PAIR, Preset, runs, settings
from benchmarks.options import StepConfig
from benchmarks.planted import run as planted
from benchmarks.suite import SUITE, figures_of, present, results_in

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
PRESET = Preset(LARGE_DEMO, seeds=3, nulls=("self", "shuffle"), downstream_pairs=2000)


def test_each_benchmark_has_the_presets_that_can_be_asked_for() -> None:
    of_each = (data.DATA_PRESETS, evaluate.PRESETS, planted.PRESETS, recovery.PRESETS, suite.STEPS)
    assert [tuple(presets) for presets in of_each] == [options.PRESETS] * len(of_each)


def evaluate_rows() -> list[dict[str, Any]]:
    """Results as `evaluate` writes them, with other numbers for each measure, run and seed."""
    return [
        {
            **run._asdict(),
            **{
                name: None
                if run.architecture != "dfc" and name.startswith("kl/")
                else 0.5 + 0.001 * i + 0.01 * j + 0.003 * run.seed * (-1) ** i
                for i, name in enumerate(MEASURES)
            },
            **{f"{name}_seconds": 9.0 for name in ("training", "evaluating", "downstream")},
            "ratio_to_encoder_product": 7.0 + 0.1 * j,
            "evaluating_peak_bytes": 10**9,
            "machine": "x86_64, 2 cores",
            "settings": settings(run, PRESET),
        }
        for j, run in enumerate(runs(PRESET))
    ]


def rows_of(name: str) -> list[Mapping[str, Any]]:
    return [*evaluate_rows()] if name == "evaluate" else [*results_in(COMMITTED)[name]]


def write_rows(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows_of(name)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The benchmarks that were run, each of which writes what is committed."""
    order: list[str] = []

    def fake(name: str) -> Any:
        def run(_options: Any, folder: Path) -> None:
            order.append(name)
            write_rows(name, folder)

        return run

    for name, one in SUITE.items():
        monkeypatch.setitem(SUITE, name, one._replace(run=fake(name)))
    return order


@pytest.mark.slow
def test_all_of_the_suite_is_run_and_written_as_tables_and_pictures(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["all", "--output", str(tmp_path)]) == 0
    # What is timed comes before what leaves memory in pieces.
    assert ran[:2] == ["step", "data"] and sorted(ran) == sorted(SUITE)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.{kind}" for name in SUITE for kind in ("json", "md", "svg")}
    out = capsys.readouterr().out
    for name in SUITE:
        title = next(SUITE[name].tables(rows_of(name))).title
        assert title in out and title in (tmp_path / f"{name}.md").read_text()


@pytest.mark.slow
def test_one_failure_does_not_lose_the_others(
    ran: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_options: Any, _folder: Path) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setitem(SUITE, "evaluate", SUITE["evaluate"]._replace(run=fail))
    assert main(["all", "--output", str(tmp_path)]) == 1
    assert sorted([*ran, "evaluate"]) == sorted(SUITE)
    assert "failed: evaluate" in capsys.readouterr().out
    assert (tmp_path / "recovery.svg").exists() and not (tmp_path / "evaluate.svg").exists()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[StepConfig]:
    """The steps that were measured."""
    made: list[StepConfig] = []

    def run(cfg: StepConfig, folder: Path, filename: str) -> None:
        made.append(cfg)
        chosen = {"rounds": cfg.rounds, "dtype": cfg.dtype, "device": cfg.device}
        (template, *_) = results_in(COMMITTED)["step"]
        sizes = {**template["sizes"], "d_sae": cfg.d_sae}
        folder.mkdir(exist_ok=True)
        (folder / filename).write_text(json.dumps({**template, "sizes": sizes, "settings": chosen}))

    monkeypatch.setattr(suite, "run_step_benchmark", run)
    return made


def test_of_a_step_the_full_suite_has_four_files_and_measures_none_again(
    timed: list[StepConfig], tmp_path: Path
) -> None:
    options = suite.BenchmarkOptions("all", preset="full", reference="checkout")
    for _ in range(2):
        SUITE["step"].run(options, tmp_path)
    assert [(cfg.dtype, cfg.d_sae) for cfg in timed] == [
        ("float32", 8192),
        ("float32", 32768),
        ("bfloat16", 8192),
        ("bfloat16", 32768),
    ]
    assert {cfg.reference for cfg in timed} == {"checkout"}
    assert len(present(tmp_path, "step")[0].cells) == 5


def test_results_of_other_settings_are_not_taken_for_those_wanted(
    timed: list[StepConfig], tmp_path: Path
) -> None:
    small, full = (suite.BenchmarkOptions("all", preset=name) for name in ("small", "full"))
    SUITE["step"].run(small, tmp_path)
    with pytest.raises(ValueError, match=r"other settings: \{'rounds': 3\}.* Name another"):
        SUITE["step"].run(full, tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({"preset": "full"}))
    with pytest.raises(ValueError, match=r"other settings: \{'preset': 'full'\}"):
        SUITE["data"].run(small, tmp_path)
    assert len(timed) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE)
def test_a_picture_is_the_same_bytes_for_the_same_results(name: str, tmp_path: Path) -> None:
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in pictures:
        SUITE[name].plot(rows_of(name), path)
    one, two = (path.read_bytes() for path in pictures)
    assert one == two and b"<dc:date>" not in one


@pytest.mark.slow
def test_a_null_is_told_from_what_it_is_held_against(tmp_path: Path) -> None:
    write_rows("evaluate", tmp_path)
    (table,) = present(tmp_path, "evaluate")
    assert table.cells[0] == [
        "",
        "dfc, two models",
        "batchtopk_crosscoder, two models",
        *(
            f"{a}, null: {n}"
            for n in ("model A twice", "pairs shuffled")
            for a in ("dfc", "batchtopk_crosscoder")
        ),
    ]
    (kl,) = (row for row in table.cells if row[0].startswith("KL without") and "A" in row[0])
    assert [cell == "–" for cell in kl[1:]] == [False, True] * 3


# --- comparing ---


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        for name in SUITE:
            write_rows(name, folder)
    return old, new


def changed(folder: Path, name: str, change: Any) -> None:
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())
    for row in rows:
        change(row)
    path.write_text(json.dumps(rows))


def compared(old: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    status = main(["compare", str(old), str(new), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_folder_is_not_worse_than_itself(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = compared(*folders, capsys)
    assert status == 0
    assert {c["flag"] for c in found} == {"within noise", "not comparable"}
    assert {c["why"] for c in found if c["flag"] == "not comparable"} == {
        "a raw time depends on the machine and the moment; compare its ratio"
    }
    benchmarks = {c["figure"].partition(":")[0] for c in found if c["flag"] == "within noise"}
    assert benchmarks == set(SUITE)


def test_what_got_worse_is_named_and_decides_the_exit_status(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_features(row: Any) -> None:
        if row["architecture"] == "dfc-reassigned" and row["d_sae_per_feature"] == 2.0:
            row["exclusive_recall"] -= 0.2 + 0.01 * row["seed"]

    changed(folders[1], "recovery", lose_features)
    assert main(["compare", *map(str, folders)]) == 1
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith(
        "recovery: dfc-reassigned, 2 latents per feature: exclusive_recall  worse"
    )
    # The other way round it got better, and that is no failure.
    status, found = compared(folders[1], folders[0], capsys)
    assert status == 0 and found[0]["flag"] == "better"


def test_more_called_exclusive_on_a_null_is_worse_and_on_two_models_another_result(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def call_more(row: Any) -> None:
        row["exclusive/significant_share"] += 0.2 + 0.001 * row["seed"]

    changed(folders[1], "evaluate", call_more)
    _, found = compared(*folders, capsys)
    flags = {c["figure"]: c["flag"] for c in found if c["figure"].endswith("significant_share")}
    assert flags[f"evaluate: dfc, {PAIR}: exclusive/significant_share"] == "changed"
    assert flags["evaluate: dfc, self: exclusive/significant_share"] == "worse"


def test_ratios_of_another_machine_are_not_compared_and_its_memory_is(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def move(row: Any) -> None:
        row["machine"] = "aarch64, 64 cores"
        row["peak_memory_ratio"] *= 1.5

    changed(folders[1], "step", move)
    _, found = compared(*folders, capsys)
    flags = {c["figure"]: (c["flag"], c["why"]) for c in found if c["figure"].startswith("step")}
    name = "step: 8,192 latents, float32 product: "
    flag, why = flags[name + "ratio_to_encoder_product"]
    assert flag == "not comparable" and "machine differs" in why
    assert flags[name + "peak_memory_ratio"][0] == "worse"


def test_other_toy_pairs_and_other_organisms_are_not_compared(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def another(row: Any) -> None:
        row["settings"]["organism"] = "built otherwise"

    def wider(row: Any) -> None:
        row["settings"]["toy"]["d_a"] = 97

    changed(folders[1], "planted", another)
    changed(folders[1], "recovery", wider)
    _, found = compared(*folders, capsys)
    own = [c for c in found if c["figure"].startswith(("planted", "recovery"))]
    assert {c["flag"] for c in own} == {"not comparable"}
    assert "d_a differs: 96 / 97" in {c["why"] for c in own}


def test_with_one_seed_recovery_is_compared_over_its_cases(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders:
        path = folder / "recovery.json"
        rows = [row for row in json.loads(path.read_text()) if row["seed"] == 0]
        path.write_text(json.dumps(rows))

    def lose_features(row: Any) -> None:
        if row["architecture"] == "dfc" and not row["null"]:
            row["shared_recall"] -= 0.3 + 0.01 * row["d_sae_per_feature"]

    changed(folders[1], "recovery", lose_features)
    status, found = compared(*folders, capsys)
    told = [c["figure"] for c in found if c["flag"] == "worse"]
    assert status == 1 and told == ["recovery: dfc: shared_recall"]


def test_rounds_are_used_where_both_have_them(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def with_rounds(factor: float) -> Any:
        def change(row: Any) -> None:
            row["rounds"] = [
                {name: row[name] * factor * (1 + 0.01 * i) for name in row["spread"]}
                for i in range(7)
            ]

        return change

    for folder, factor in zip(folders, (1.0, 1.3), strict=True):
        changed(folder, "step", with_rounds(factor))
    status, found = compared(*folders, capsys)
    ratios = [
        c
        for c in found
        if c["figure"].endswith("ratio_to_encoder_product") and "step" in c["figure"]
    ]
    assert status == 1 and len(ratios) == 4
    assert {(c["flag"], c["why"]) for c in ratios} == {("worse", "")}


def test_single_files_are_told_by_what_is_in_them(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in SUITE:
        (tmp_path / "renamed.json").write_bytes((folders[0] / f"{name}.json").read_bytes())
        names = {figure.name.partition(":")[0] for figure in figures_of(tmp_path / "renamed.json")}
        assert names == {name}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "one"], "takes 2 folders or files, got 1: one"),
        (["all", "one"], "takes no folders or files, got 1: one"),
        (["all", "--d-sae", "9"], "d_sae: for `step`, not for all"),
        (["compare", "{empty}", "{empty}"], "has no results of step, data, evaluate"),
        (["compare", "{text}", "{text}"], "is not a file of results"),
        (["compare"], "takes 2 folders or files, got 0. Results"),
        (["compare", "{none}", "{none}"], "No such file or directory: '{none}'."),
        (["recovery", "--jobs", "0"], "jobs must be at least 1, got 0."),
        (["recovery", "--output", "{text}"], "--output {text} is not a folder."),
        (["recovery", "--output", "{text}/x"], "cannot be made in {text}."),
        (["step", "--device", "nowhere"], "device 'nowhere' is not available: Expected one of"),
        (["step", "--reference", "{none}"], "{none} is not a checkout of"),
        (["step", "--config", "{none}"], "No such file or directory: '{none}'."),
    ],
)
def test_bad_input_is_one_error(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no JSON")
    places = {name: str(tmp_path / name) for name in ("empty", "text", "none")}
    assert main([arg.format(**places) for arg in args]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks: error: ") and line.endswith(".")
    assert message.format(**places) in line and not (tmp_path / "none").exists()


def test_another_benchmark_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["speed"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks: error: ") and "invalid choice: 'speed'" in line


def test_help_has_the_first_sentence_of_the_options() -> None:
    assert " ".join((options.BenchmarkOptions.__doc__ or "").split()) == SUMMARY


@pytest.mark.slow
def test_help_imports_nothing_large_and_results_are_compared_from_a_shell() -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", "-m", "benchmarks", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    helped, compared = run("--help"), run("compare", str(COMMITTED), str(COMMITTED))
    modules = {line.rpartition("|")[2].strip() for line in helped.stderr.splitlines()}
    assert "simple_parsing" in modules and {"torch", "sae_lens", "matplotlib"} & modules == set()
    assert helped.stdout.startswith("usage: python -m benchmarks [-h]")
    assert compared.stdout.startswith("No figure differs beyond noise.")


# --- the page ---


def test_the_pages_tables_are_what_the_results_give() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "write_readme.py"))
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert script["filled"](page) == page, "run benchmarks/write_readme.py"
    blocks = {match[2] for match in script["BLOCK"].finditer(page)}
    assert blocks == set(script["BLOCKS"])


@pytest.mark.parametrize("name", results_in(COMMITTED))
def test_the_tables_beside_the_results_are_what_they_give(name: str) -> None:
    tables = SUITE[name].tables(results_in(COMMITTED)[name])
    text = "\n\n".join(table.markdown() for table in tables) + "\n"
    assert (COMMITTED / f"{name}.md").read_text(encoding="utf-8") == text
