"""`sae-lens-dfc evaluate RUN --output DIR` on two tiny models: a run measured in every way, beside
its nulls."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from tests.helpers import train_tiny

pytestmark = pytest.mark.slow

SMALL = ["--eval-pairs", "1500", "--downstream-pairs", "300", "--behavior-latents", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    return train_tiny(folder, llama_folder, gpt2_folder, "--max-unique-pairs", "3000")


@pytest.fixture(scope="module")
def seed_folder(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """Model A from another seed."""
    folder = tmp_path_factory.mktemp("models") / "other-llama"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(LlamaConfig.from_pretrained(llama_folder)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(run: Path, seed_folder: Path) -> Path:
    output = run.parent / "evaluation"
    args = ["--null", "self", "shuffle", "seed", "--seed-model", str(seed_folder)]
    assert main(["evaluate", str(run), "--output", str(output), *args, *SMALL]) == 0
    return output


@pytest.fixture(scope="module")
def metrics(evaluation: Path) -> dict[str, float]:
    return json.loads((evaluation / "metrics.json").read_text())


def test_every_measure_stands_beside_the_same_of_each_null(metrics: dict[str, float]) -> None:
    names = [
        *(f"loss_recovered/{m}" for m in "ab"),
        *(f"loss_recovered/{m}/{part}" for m in "ab" for part in ("shared_only", "exclusive_only")),
        *(f"loss_recovered/{m}/without_exclusive" for m in "ab"),
        *("kl/a", "kl/b", "spliced_share/a", "spliced_share/b"),
        *(f"mapped_loss/{x}/{m}" for x in ("untouched", "rise", "rise_of_mean") for m in "ab"),
        *("mapped_loss/b_minus_a", "mapped_loss/b_over_a"),
        *("explained_variance/a", "mse/a", "cosine/b", "norm_ratio/b", "l0/shared"),
        *("cross_reconstruction/b_from_a", "cross_reconstruction/a_from_b"),
        "cross_reconstruction/b_from_a/mapped",
        *("affine_map/a_to_b", "affine_map/a_to_b_to_a", "decoder_cosine/a_to_b"),
        *("exclusive/judged/a_exclusive", "exclusive/significant/a_exclusive"),
    ]
    for name in names:
        for prefix in ("", "null/self/", "null/shuffle/", "null/seed/"):
            assert math.isfinite(metrics[prefix + name]), prefix + name
    for prefix in ("", "null/self/", "null/shuffle/", "null/seed/"):
        for kind in ("latent_scaling/nu_error/", "transfer/auc/", "behavior/"):
            assert any(name.startswith(prefix + kind) for name in metrics), prefix + kind


def test_tokens_are_told_apart_by_frequency_where_rows_are_of_their_tokens(
    metrics: dict[str, float],
) -> None:
    for prefix in ("", "null/self/", "null/seed/"):
        assert f"{prefix}explained_variance/b/token_decile_9" in metrics
    assert "null/shuffle/explained_variance/b/token_decile_9" not in metrics


def test_one_model_twice_is_told_whole_by_itself_and_shuffled_pairs_tell_nothing(
    metrics: dict[str, float],
) -> None:
    assert metrics["null/self/affine_map/a_to_b"] > 0.99
    assert metrics["null/shuffle/affine_map/a_to_b"] < 0.1
    assert metrics["null/self/cross_reconstruction/b_from_a/mapped"] == pytest.approx(
        metrics["null/self/explained_variance/b"], abs=0.02
    )
    assert metrics["null/shuffle/cross_reconstruction/b_from_a/mapped"] < 0.1
    assert metrics["null/self/exclusive/significant_share"] <= 0.02


def test_the_same_untouched_models_stand_under_the_shuffled_null(metrics: dict[str, float]) -> None:
    for name in ("loss/a/untouched", "loss/b/untouched", "loss/b/zero"):
        assert metrics[f"null/shuffle/{name}"] == pytest.approx(metrics[name], rel=1e-5)
    assert metrics["null/self/loss/b/untouched"] == pytest.approx(
        metrics["null/self/loss/a/untouched"], rel=1e-6
    )


def test_one_model_twice_loses_nothing_by_its_map_and_shuffled_pairs_map_to_the_mean(
    metrics: dict[str, float],
) -> None:
    for m in ("a", "b"):
        assert metrics[f"null/self/mapped_loss/rise/{m}"] == pytest.approx(0, abs=1e-3)
        assert metrics[f"null/shuffle/mapped_loss/rise/{m}"] == pytest.approx(
            metrics[f"null/shuffle/mapped_loss/rise_of_mean/{m}"], abs=5e-3
        )
        assert metrics[f"mapped_loss/untouched/{m}"] == pytest.approx(
            metrics[f"loss/{m}/untouched"], rel=1e-5
        )
        assert metrics[f"mapped_loss/rise_of_mean/{m}"] == pytest.approx(
            metrics[f"loss/{m}/mean"] - metrics[f"loss/{m}/untouched"], abs=1e-5
        )


def test_which_model_knows_more_is_said_on_the_page(evaluation: Path) -> None:
    page = (evaluation / "report.html").read_text()
    assert "activations mapped into it, B" in page
    assert "Rise of A&#39;s loss, given B&#39;s activations" in page


def test_with_a_column_who_knows_more_and_where_latents_fire_are_measured_by_its_values(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = reference_pages()[:24]
    lines = [{"text": page, "section": f"s{i % 2}"} for i, page in enumerate(pages)]
    text = tmp_path / "sections.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    asked = ["evaluate", str(run), "--dataset", str(text), "--null", "none", *SMALL]
    output = tmp_path / "by"
    assert main([*asked, "--by", "section", "--output", str(output)]) == 0
    assert "By group of text: on s" in capsys.readouterr().out
    found = json.loads((output / "metrics.json").read_text())
    for name in ("mapped_loss/rise/a", "mapped_loss/untouched/b"):
        parts = [found[name.replace("/", f"/s{i}/", 1)] for i in (0, 1)]
        assert min(parts) < found[name] < max(parts)
    with (output / "latents.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    fires = [line for line in lines if float(line["firing_rate"]) > 0]
    assert {line["top_group"] for line in fires} == {"s0", "s1"}
    assert all(0.5 <= float(line["top_group_share"]) <= 1 for line in fires)
    assert "of its firings are on s" in (output / "report.html").read_text()
    assert main([*asked, "--by", "chapter"]) == 1
    assert "has no column 'chapter' to group its documents by" in capsys.readouterr().err


def test_a_share_is_beyond_each_null(metrics: dict[str, float]) -> None:
    beyond = {n: v for n, v in metrics.items() if n.startswith("beyond_null/self/")}
    assert beyond and all(0 <= value <= 1 for value in beyond.values())
    assert metrics["beyond_null/shuffle/transfer/auc/shared"] > 0.5


def test_every_latent_has_its_line(evaluation: Path, metrics: dict[str, float]) -> None:
    with (evaluation / "latents.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["latent"]) for line in lines] == list(range(64))
    assert lines[0]["partition"] == "a_exclusive" and lines[0]["is_a"] == "True"
    called = sum(line["is_exclusive"] == "True" for line in lines)
    assert called == sum(metrics[f"exclusive/significant/{m}_exclusive"] for m in "ab")


def test_the_page_says_of_each_candidate_whether_it_is_called(evaluation: Path) -> None:
    page = (evaluation / "report.html").read_text()
    assert "null: model A twice" in page and "null: two initializations" in page
    assert "not shown to be exclusive" in page or "with evidence" in page


def test_the_table_of_the_page_has_every_latent_that_fires_and_contexts_of_the_first(
    evaluation: Path,
) -> None:
    page = (evaluation / "report.html").read_text()
    found = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data = json.loads(found[1])
    with (evaluation / "latents.csv").open(encoding="utf-8") as file:
        lines = {int(line["latent"]): line for line in csv.DictReader(file)}
    alive = {latent for latent, line in lines.items() if float(line["firing_rate"]) > 0}
    columns = data["columns"]
    assert set(columns["latent"]) == alive and len(columns["latent"]) == len(alive)
    first = columns["latent"][0]
    assert columns["max"][0] == pytest.approx(float(lines[first]["max_activation"]), rel=1e-3)
    assert data["evidence"]["auc"][0] == pytest.approx(float(lines[first]["auc"]), rel=1e-3)
    assert str(first) in data["cards"]


def test_it_is_the_same_again_and_other_folders_stay(
    run: Path, evaluation: Path, metrics: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", str(run), "--output", str(evaluation), "--null", "none", *SMALL, "--json"]
    assert main(args) == 1
    assert "already holds a set of measures" in capsys.readouterr().err
    for overwrite in ([], ["--overwrite"]):
        assert main(["evaluate", str(run), "--output", str(run), *overwrite]) == 1
        assert "holds a run, which is never overwritten" in capsys.readouterr().err
    assert (run / "sae_weights.safetensors").is_file()
    assert main([*args, "--overwrite"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert not any(name.startswith("null/") for name in again)
    for name, value in again.items():
        assert value == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_wrong_nulls_are_refused_before_any_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "e")]
    for args, message in (
        (["--null", "twin"], "no null 'twin'"),
        (["--null", "seed"], "--seed-model"),
        (["--judge", "oracle"], "oracle"),
    ):
        assert main(["evaluate", str(run), *output, *args]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(run), f"{run}/", *output]) == 1
    assert "evaluate one run at a time" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--judge", "local:somewhere"]) == 1
    assert "--judge only applies with --output or --null" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_page_made_anew_keeps_the_verdicts_and_the_nulls(
    run: Path, evaluation: Path, tmp_path: Path
) -> None:
    for name in ("metrics.json", "latents.csv"):
        (run / name).write_text((evaluation / name).read_text())
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "with evidence" in page or "not shown to be exclusive" in page or "not judged" in page
    assert (
        main(["report", str(run), "--output", str(tmp_path / "few.html"), "--eval-pairs", "200"])
        == 0
    )
    assert "null: model" not in (tmp_path / "few.html").read_text()
