"""`sae-lens-dfc export RUN --model a --output DIR` on a crosscoder of two tiny models."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from torch import Tensor

from sae_lens_dfc import load_crosscoder
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.saved_run.held_out import opened_run
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.paired_text import PairedText
from tests.helpers import train_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("exporting")
    return train_tiny(folder, llama_folder, gpt2_folder, "--max-unique-pairs", "2000", n_texts=8)


@pytest.fixture(scope="module")
def of_a(run: Path) -> Path:
    args = ["--model", "a", "--output", str(run.parent / "sae_a"), "--eval-pairs", "800"]
    assert main(["export", str(run), *args]) == 0
    return run.parent / "sae_a"


@pytest.fixture(scope="module")
def held_out(run: Path) -> Tensor:
    _, cfg, pair = opened_run(str(run), HeldOutOptions(eval_pairs=800))
    return torch.cat([rows.acts for rows in PairedText(cfg, pair).collect("held_out", "").rows])


def test_saelens_opens_it_and_it_says_where_it_comes_from(of_a: Path, run: Path) -> None:
    sae, crosscoder = SAE.load_from_disk(of_a), load_crosscoder(run)
    assert type(sae) is JumpReLUSAE and (sae.cfg.d_in, sae.cfg.d_sae) == (16, 52)
    metadata = sae.cfg.metadata
    assert metadata.model_name == "tiny-llama"
    assert metadata.hook_name == crosscoder.cfg.metadata.model_a["hook_name"]
    assert metadata.hook_name == f"blocks.{metadata.hook_layer}.hook_resid_post"
    assert metadata.get("exported_from")["model_b"] == crosscoder.cfg.metadata.model_b
    assert metadata.latents == [*range(12), *range(24, 64)]


def test_its_measures_are_those_of_the_held_out_text(
    of_a: Path, run: Path, held_out: Tensor
) -> None:
    """Computed here anew, at once and in float64."""
    sae, crosscoder = SAE.load_from_disk(of_a), load_crosscoder(run)
    told = sae.cfg.metadata.get("difference_to_crosscoder")
    assert told["rows"] == len(held_out) == 800
    with torch.no_grad():
        two = crosscoder.encode(held_out)[:, sae.cfg.metadata.latents]
        one = sae.encode(held_out[:, :16])
        rebuilt = crosscoder.decode(crosscoder.encode(held_out))[:, :16]
        alone = sae.decode(one)
    assert torch.equal(one[:, :12] > 0, two[:, :12] > 0)
    two, one, x = two[:, 12:].double(), one[:, 12:].double(), held_out[:, :16].double()
    total = (x - x.mean(dim=0)).pow(2).sum()
    deviations = (two - two.mean(dim=0)).pow(2).sum()
    assert told == pytest.approx(
        {
            **{name: value for name, value in told.items() if name.endswith("/se")},
            **{name: 1.0 for name in told if "a_exclusive" in name and not name.endswith("/se")},
            "rows": 800,
            "l0/crosscoder": told["l0/crosscoder"],
            "l0/exported": told["l0/exported"],
            "explained_variance/crosscoder": 1 - ((x - rebuilt).pow(2).sum() / total).item(),
            "explained_variance/exported": 1 - ((x - alone).pow(2).sum() / total).item(),
            "feature_acts_explained_variance/shared": 1
            - ((two - one).pow(2).sum() / deviations).item(),
            "firing_precision/shared": (two[one > 0] > 0).double().mean().item(),
            "firing_recall/shared": (one[two > 0] > 0).double().mean().item(),
            "firing_recall_median/shared": told["firing_recall_median/shared"],
        },
        rel=1e-4,
    )


def test_a_map_of_the_training_text_does_better_than_the_mean(
    run: Path, of_a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run.parent / "by_mean"
    args = ["--model", "a", "--output", str(output), "--eval-pairs", "800", "--fit-pairs", "0"]
    assert main(["export", str(run), *args, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    by_mean, by_map = (SAE.load_from_disk(path).cfg.metadata for path in (output, of_a))
    assert printed == {"output": str(output), **by_mean.get("difference_to_crosscoder")}
    assert by_mean.other_model_filled_in_by == "its mean (b_dec)"
    name = "feature_acts_explained_variance/shared"
    told = by_map.get("difference_to_crosscoder")
    assert told[name] - told[f"{name}/se"] > printed[name] + printed[f"{name}/se"]


def test_it_prints_the_sae_beside_the_crosscoder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run.parent / "sae_b"
    args = ["--model", "b", "--output", str(output), "--eval-pairs", "400", "--fit-pairs", "500"]
    assert main(["export", str(run), *args]) == 0
    printed = capsys.readouterr().out
    told = SAE.load_from_disk(output).cfg.metadata.get("difference_to_crosscoder")
    assert f"{told['explained_variance/exported']:.3f} ± " in printed
    assert f"{told['firing_recall/shared']:.3f} ± " in printed
    assert f"SAE of tiny-gpt2: {output}" in printed


def test_what_is_there_stays_unless_it_is_an_sae_that_may_go(
    run: Path, of_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (of_a / "sae_weights.safetensors").read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    few = ["--model", "a", "--eval-pairs", "300", "--fit-pairs", "0"]
    for output, more, message in (
        (run, ["--overwrite"], "holds a run, which is never overwritten"),
        (of_a, [], "already holds a SAE"),
        (tmp_path, ["--overwrite"], "holds files that are not a SAE"),
        (tmp_path / "new", ["--fit-pairs", "-1"], "fit_pairs must be at least 0"),
        (tmp_path / "new", ["--model-b", str(tmp_path)], "Could not load a tokenizer"),
    ):
        assert main(["export", str(run), "--output", str(output), *few, *more]) == 1
        assert message in capsys.readouterr().err
    assert (of_a / "sae_weights.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (run / "runner_cfg.json").is_file()
    assert main(["export", str(run), "--output", str(of_a), *few, "--overwrite"]) == 0
    assert (of_a / "sae_weights.safetensors").read_bytes() != before
