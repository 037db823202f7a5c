"""`sae-lens-dfc latents RUN` on two tiny models."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu

from sae_lens_dfc.analysis.report.results import read_evidence
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.contexts import PairCounts, Part
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.metrics.exclusivity.evidence import ranking
from sae_lens_dfc.models.config import ModelConfig
from tests.helpers import make_batchtopk, train_tiny

Listed = Callable[..., Any]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_texts(folder / "shouted.jsonl", [page.upper() for page in reference_pages()[12:16]])
    return train_tiny(folder, llama_folder, gpt2_folder, "--eval-pairs", "1500")


@pytest.fixture
def listed(run: Path, capsys: pytest.CaptureFixture[str]) -> Listed:
    """What `latents RUN --json` prints, given more flags."""

    def listed(*args: str) -> Any:
        capsys.readouterr()
        assert main(["latents", str(run), "--json", *args]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return listed


@pytest.fixture
def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line in which `latents RUN` fails, given more flags."""

    def refused(*args: str) -> str:
        assert main(["latents", str(run), *args]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    return refused


def test_latents_are_listed_with_all_that_is_on_their_cards(listed: Listed) -> None:
    result = listed("--top", "8")
    assert result["has_evidence"] is False and result["pairs_evaluated"] > 1000
    strength = [card["firing_rate"] * card["mean_activation"] for card in result["latents"]]
    assert len(strength) == 8 and strength == sorted(strength, reverse=True)
    for card in result["latents"]:
        models = {"a_exclusive": ["a"], "b_exclusive": ["b"], "shared": ["a", "b"]}
        assert list(card["logit_effects"]) == models[card["partition"]]
        assert card["evidence"] == {} and card["verdict"] == "" and "contrast" not in card
        assert card["contexts"][0]["activation"] == card["max_activation"]
        quantiles = [context["quantile"] for context in card["contexts"]]
        assert quantiles[0] is None and {q for q in quantiles if q is not None} <= {0, 1, 2, 3}
        for context in card["contexts"]:
            assert context["document"] in (3, 7, 11)  # every fourth is held out
            assert context["activation"] in [s["activation"] for s in context["segments"]]


@pytest.mark.slow
def test_each_order_is_that_of_its_measure_and_a_partition_is_kept_to(listed: Listed) -> None:
    for partition in ("a_exclusive", "b_exclusive", "shared"):
        cards = listed("--partition", partition, "--sort", "firing_rate", "--top", "9")["latents"]
        assert {card["partition"] for card in cards} == {partition}
        rates = [card["firing_rate"] for card in cards]
        assert rates == sorted(rates, reverse=True) and rates[-1] >= 5 / 1600
    cards = listed("--sort", "relative_decoder_norm", "--top", "64")["latents"]
    one_sided = [abs(card["relative_decoder_norm"] - 0.5) for card in cards]
    assert one_sided == sorted(one_sided, reverse=True)
    # Of two widths the decoders are moved by a map; what only one model has differs wholly.
    cards = listed("--sort", "difference", "--top", "64")["latents"]
    is_shared = [card["partition"] == "shared" for card in cards]
    assert is_shared == sorted(is_shared) and any(is_shared) and not all(is_shared)


@pytest.mark.slow
def test_by_evidence_they_stand_as_the_evaluation_ranks_them(
    run: Path, listed: Listed, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "--output FOLDER" in refused("--sort", "evidence")
    assert "does not exist or has no evidence" in refused("--evidence", str(tmp_path))
    output = tmp_path / "evaluation"
    small = ["--downstream-pairs", "0", "--behavior-latents", "0", "--null", "none"]
    assert main(["evaluate", str(run), "--output", str(output), *small]) == 0
    result = listed("--sort", "evidence", "--evidence", str(output), "--top", "64")
    evidence = read_evidence(output / "latents.csv", d_sae=64)
    assert evidence is not None and result["has_evidence"] is True
    latents = [card["latent"] for card in result["latents"]]
    assert latents == [i for i in ranking(evidence).tolist() if i in latents] and len(latents) > 20
    for card in result["latents"]:
        p = evidence.p[card["latent"]].item()
        assert card["evidence"].get("p") == (None if math.isnan(p) else p)
        assert card["verdict"]
    assert any("p" in card["evidence"] for card in result["latents"])
    lines = (output / "latents.csv").read_text().splitlines()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "latents.csv").write_text("\n".join(lines[:-1]))
    assert "does not belong to this crosscoder" in refused("--evidence", str(foreign))
    with (output / "latents.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 64


@pytest.mark.slow
def test_what_fires_on_one_text_and_not_on_another_comes_first(run: Path, listed: Listed) -> None:
    shouted, quiet = run.parent / "shouted.jsonl", run.parent / "text.jsonl"
    args = ["--dataset", str(shouted), "--against", str(quiet), "--eval-pairs", "1000"]
    cards = listed(*args, "--sort", "contrast", "--top", "64")["latents"]
    found = {card["latent"]: card["contrast"] for card in cards}
    aurocs = [values["auroc"] for values in found.values()]
    assert aurocs == sorted(aurocs, reverse=True) and aurocs[0] > 0.8
    crosscoder, maxima = load_crosscoder(run), []
    settings = json.loads((run / "runner_cfg.json").read_text())
    models = ModelPair.load(*(ModelConfig(**settings[name]) for name in ("model_a", "model_b")))
    # Of the run's own text only what it held out is read.
    read: list[tuple[Path, Part]] = [(shouted, "all"), (quiet, "held_out")]
    for path, part in read:
        every = settings["eval_every_n_documents"]
        cfg = CacheConfig(
            dataset_path=str(path), context_size=48, eval_pairs=1000, eval_every_n_documents=every
        )
        of_text: list[torch.Tensor] = []
        for rows in PairedText(cfg, models).rows(part, PairCounts()):
            acts = crosscoder.encode(rows.acts).detach()
            of_text += [acts[rows.context == c].amax(dim=0) for c in rows.context.unique()]
        maxima.append(torch.stack(of_text).numpy())
    u = mannwhitneyu(*maxima, axis=0).statistic / (len(maxima[0]) * len(maxima[1]))
    for latent, values in found.items():
        assert values["auroc"] == pytest.approx(u[latent], abs=2e-3)


@pytest.mark.slow
def test_a_text_does_not_differ_from_itself(run: Path, listed: Listed) -> None:
    text = str(run.parent / "shouted.jsonl")
    cards = listed("--dataset", text, "--against", text, "--eval-pairs", "500")["latents"]
    assert cards
    for card in cards:
        assert card["contrast"] == {"cohens_d": 0.0, "auroc": pytest.approx(0.5, abs=1e-12)}


@pytest.mark.slow
def test_people_see_a_line_for_each_latent_and_where_it_fires(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["latents", str(run), "--top", "3", "--partition", "b_exclusive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    for line, text in zip(lines[0:6:2], lines[1:6:2], strict=True):
        assert "b_exclusive · fires on" in line and "promotes in B '" in line
        assert "[document" in text and text.count("«") == text.count("»") == 1
    assert "was not measured" in lines[-1]


def test_what_cannot_be_listed_is_refused_before_a_model_is_opened(
    refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--against" in refused("--sort", "contrast")
    assert "top must be at least 1, got 0" in refused("--top", "0")
    make_batchtopk().to_inference().save_model(tmp_path)
    assert main(["latents", str(tmp_path), "--partition", "a_exclusive"]) == 1
    assert "has no latent in a_exclusive" in capsys.readouterr().err
    assert main(["latents", str(tmp_path / "nowhere")]) == 1
    assert "is not a crosscoder" in capsys.readouterr().err
