"""The command line on two tiny models."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks.__main__ import main as run_benchmark
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.training.recipes.named import RECIPES
from tests.helpers import write_pages

Output = Callable[[], tuple[str, str]]


@pytest.fixture(scope="module")
def flags(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path
) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_pages(text, 12)
    return [
        *("--model-a.model-name", str(llama_folder), "--model-b.model-name", str(gpt2_folder)),
        *("--dataset-path", str(text), "--eval-every-n-documents", "4", "--context-size", "48"),
        *("--training-tokens", "1280", "--train-batch-size-tokens", "64"),
        *("--n-batches-in-buffer", "8", "--n-batches-for-norm-estimate", "2"),
        *("--sae.d-sae", "64", "--sae.k", "4", "--sae.a-exclusive-fraction", "0.1", "--lr", "3e-3"),
    ]


@pytest.fixture(scope="module")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *flags, "--output-path", str(folder)]) == 0
    return folder


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which a command fails."""
    capsys.readouterr()
    assert main(args) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_train_writes_a_crosscoder_and_says_where(run: Path) -> None:
    assert {"cfg.json", "sae_weights.safetensors", "runner_cfg.json"} <= {
        path.name for path in run.iterdir()
    }


@pytest.mark.slow
def test_the_path_of_a_step_and_the_format_of_its_product_are_flags(
    flags: list[str], tmp_path: Path
) -> None:
    more = ["--sae.training-path", "sparse", "--sae.encoder-product", "bfloat16", "--autocast"]
    assert main(["train", *flags, *more, "--output-path", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    sae = settings["sae"]
    assert (sae["training_path"], sae["encoder_product"]) == ("sparse", "bfloat16")
    assert settings["autocast"] is True
    assert main(["evaluate", str(tmp_path / "run"), "--eval-pairs", "300", "--json"]) == 0


@pytest.mark.slow
def test_evaluate_prints_measures_for_people_and_machines(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--eval-pairs", "300", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["max_forbidden_weight"] == 0
    assert metrics["pairs_evaluated"] == pytest.approx(300, abs=5)
    assert main(["evaluate", str(run), "--eval-pairs", "300"]) == 0
    assert "Explained variance, A" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_of_two_seeds_says_how_far_they_agree(
    flags: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main(["train", *flags, "--seed", "1", "--output-path", str(other)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), str(other), "--eval-pairs", "300", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["runs"]) == {str(run), str(other)}
    matched = result["stability/matched/shared"]
    assert len(matched) == 1 and 0 <= matched[0] < 1
    assert main(["evaluate", str(run), f"{run}/", "--eval-pairs", "300"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"stability/matched/a_exclusive +1.000", out)
    assert re.search(r"Explained variance, A +0\.\d+ +0\.\d+\n", out)
    assert "A run is given twice" in fails(["evaluate", str(run), str(run)], capsys)


@pytest.mark.slow
def test_report_goes_into_the_run_unless_told_otherwise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--eval-pairs", "300"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    other = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--eval-pairs", "300", "--output", str(other)]) == 0
    assert "tiny-llama" in other.read_text() and '"contexts":[[' in other.read_text()


@pytest.mark.slow
def test_a_recipe_gives_the_flags_and_others_win(flags: list[str], tmp_path: Path) -> None:
    args = ["train", "--recipe", "dfc-reassigned", *flags, "--reassign-at", "0.6", "0.9"]
    assert main([*args, "--output-path", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    assert settings["sae"]["decoder_norm"] == "sum"
    # Of 20 steps of 64 pairs.
    assert (settings["sae"]["reassign_steps"], settings["sae"]["evidence_window"]) == ([12, 18], 2)


@pytest.mark.slow
def test_a_recipe_may_stand_in_the_yaml(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("recipe: dfc-reassigned\n")
    args = ["train", "--config", str(tmp_path / "c.yaml"), *flags]
    assert main([*args, "--output-path", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    assert settings["sae"]["reassign_steps"] == [16, 19]


def test_a_recipe_is_for_train_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--recipe", "dfc-reassigned"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --recipe" in capsys.readouterr().err


def test_a_recipe_asks_for_what_its_paper_does_not_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["train", "--recipe", "llama3.1-8b-vs-qwen3-8b", "--dataset-path", "x"]
    line = fails([*args, "--model-b.hook-name=blocks.18.hook_resid_post"], capsys)
    assert "needs model_a.hook_name (the paper says 'middle layers' and prints no index)" in line
    assert "model_b.hook_name" not in line and "dataset_path" not in line


def test_an_unknown_recipe_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Recipes: dfc-reassigned, llama3.1" in fails(["train", "--recipe", "dfc-best"], capsys)


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    usage = re.sub(r"-?\s+", "", capsys.readouterr().out)
    for recipe in RECIPES:
        assert re.sub("-", "", recipe) in usage.replace("-", "")


@pytest.mark.slow
def test_yaml_gives_the_flags_and_the_command_line_wins(flags: list[str], tmp_path: Path) -> None:
    values = dict(zip((f[2:].replace("-", "_") for f in flags[::2]), flags[1::2], strict=True))
    nested: dict[str, object] = {"architecture": "batchtopk_crosscoder"}
    for name, value in values.items():
        if "fraction" in name:
            continue
        group, _, leaf = name.rpartition(".")
        target = nested.setdefault(group, {}) if group else nested
        target[leaf] = value  # type: ignore[index]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(nested))
    args = ["train", "--config", str(tmp_path / "c.yaml"), "--output-path", str(tmp_path / "run")]
    assert main([*args, "--sae.k", "7"]) == 0
    settings = json.loads((tmp_path / "run" / "runner_cfg.json").read_text())
    assert settings["sae"]["architecture"] == "batchtopk_crosscoder"
    assert (settings["sae"]["k"], settings["context_size"]) == (7, 48)


def test_align_prints_coverage_and_reasons(
    llama_folder: Path, gpt2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(reference_pages()[0], encoding="utf-8")
    args = ["align", "--tokenizer-a", str(llama_folder), "--tokenizer-b", str(gpt2_folder)]
    args.append(str(tmp_path / "t.txt"))
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] + sum(result["dropped_a"].values()) == result["tokens_a"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert f"A: {result['pairs']} of {result['tokens_a']} tokens paired" in out
    assert "the other model has no token that ends at this character" in out


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--reassign-at", "1.5"],
            r"reassign_at takes fractions of the training in (0, 1), got [1.5]",
        ),
        (
            ["--sae.reassign-steps", "60"],
            r"sae.reassign_steps=[60] are beyond the end of training, which has 20 steps",
        ),
        (["--sae.k", "65"], "k must be above 0 and at most d_sae, got k=65 and d_sae=64"),
        (
            ["--sae.a-exclusive-fraction", "0.5"],
            "a_exclusive_fraction must be at least 0 and below 0.5, got 0.5",
        ),
        (
            ["--model-a.hook-name", "blocks.9.hook_resid_post"],
            "is not in model 'tiny-llama' (3 layers",
        ),
        (["--model-b.model-name", "/no/model"], "Could not load a tokenizer from '/no/model'"),
        (["--text-column", "body"], "has no text column 'body'; its columns are ['text']"),
        (["--dataset-path", "/no/data"], "Could not read data set '/no/data'"),
        (["--config", "/no/config.yaml"], "Could not read configuration /no/config.yaml"),
        (["--sae.d-a", "3"], "Set d_a=16"),
    ],
)
def test_bad_input_fails_in_one_line_and_leaves_nothing(
    extra: list[str],
    message: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["train", *flags, "--output-path", str(tmp_path / "run"), *extra]
    assert message in fails(args, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_in_use_is_refused(
    run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(["train", *flags, "--output-path", str(run)], capsys)
    assert "already holds a run. Pass --overwrite" in line


def test_other_models_than_in_training_are_refused(
    run: Path, gpt2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(["evaluate", str(run), "--model-a", str(gpt2_folder)], capsys)
    assert "This crosscoder was trained on another model a" in line


def test_a_folder_that_is_no_crosscoder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a crosscoder: it has no cfg.json" in fails(["report", str(tmp_path)], capsys)


def test_a_text_without_a_shared_position_is_refused(
    llama_folder: Path, gpt2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    args = ["align", "--tokenizer-a", str(llama_folder), "--tokenizer-b", str(gpt2_folder)]
    assert "no paired position" in fails([*args, str(tmp_path / "empty.txt")], capsys)


@pytest.mark.parametrize("args", [[], ["fly"], ["align"], ["train", "--no-such-flag", "1"]])
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert "usage: sae-lens-dfc" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["demo", "check", "train", "align", "evaluate", "report", "generate", "benchmarks"]
)
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_benchmark(["--help"]) if command == "benchmarks" else main([command, "--help"])
    assert exit_.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out.split("\noptions:\n")[1])
    texts = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries[1:]}
    bare = {flag for flag, text in texts.items() if not re.search(r"[.)] \(default|\.$", text)}
    bare -= {"--config"}
    # What SAELens' own configs do not explain.
    theirs = {
        f"--sae.{name}"
        for name in (
            "metadata",
            "reshape-activations",
            "normalize-activations",
            "apply-b-dec-to-input",
        )
    }
    assert {flag for flag in bare if not flag.startswith("--logger.")} <= theirs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has such a device")
def test_an_answer_that_nobody_takes_is_one_line_and_status_1(
    llama_folder: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("A few words, and a few more.")
    models = ["--tokenizer-a", str(llama_folder), "--tokenizer-b", str(gpt2_folder)]
    command = [sys.executable, "-m", "sae_lens_dfc", "align", *models, "--json"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*command, str(tmp_path / "t.txt")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if "rror" in line] == [
        "sae-lens-dfc: error: No space left on device."
    ]
