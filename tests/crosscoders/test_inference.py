import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_dfc import CrosscoderConfig, load_crosscoder
from tests.helpers import make_acts, make_dfc, train_steps


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    train_steps(make_dfc(), make_acts(64, 12)).save_inference_model(tmp_path / "run")
    return tmp_path / "run"


def test_save_load_encode_is_bit_equal(saved: Path, tmp_path: Path) -> None:
    first, acts = load_crosscoder(saved), make_acts(20, 12)
    first.save_model(tmp_path / "again")
    again = load_crosscoder(tmp_path / "again")
    assert torch.equal(first.encode(acts), again.encode(acts))
    assert torch.equal(first.input_scale, again.input_scale)


def test_sizes_are_saved_and_fractions_are_not(saved: Path) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    assert (cfg["n_a_exclusive"], cfg["n_b_exclusive"]) == (6, 4)
    assert "a_exclusive_fraction" not in cfg


def test_decoder_norms_are_on_the_scale_of_training(saved: Path) -> None:
    crosscoder = load_crosscoder(saved)
    # Scores are in units of the joined norm, so the two squares add up to 1 whatever the models'
    # sizes.
    torch.testing.assert_close(crosscoder.decoder_norms().pow(2).sum(dim=0), torch.ones(24))


def test_an_altered_file_is_refused(saved: Path) -> None:
    weights = load_file(saved / "sae_weights.safetensors")
    weights["W_dec"][0, -1] = 0.125
    save_file(weights, saved / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="exclusive latent has a weight of 0.125"):
        SAE.load_from_disk(saved)


def test_a_folder_that_is_no_crosscoder_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no cfg.json and no sae_weights.safetensors"):
        load_crosscoder(tmp_path)


def test_another_kind_of_sae_is_refused(tmp_path: Path) -> None:
    StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path)
    with pytest.raises(ValueError, match="holds a SAELens 'standard', not a crosscoder"):
        load_crosscoder(tmp_path)


def test_truncated_weights_are_refused(saved: Path) -> None:
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged.*Restore it"):
        load_crosscoder(saved)


def test_missing_weights_are_refused(saved: Path) -> None:
    weights = load_file(saved / "sae_weights.safetensors")
    del weights["threshold"]
    save_file(weights, saved / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="holds nothing as threshold.*damaged"):
        load_crosscoder(saved)


def test_broken_json_is_refused(saved: Path) -> None:
    (saved / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="cfg.json is not sound JSON"):
        load_crosscoder(saved)


def test_widths_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="d_in=5, d_a=2, d_b=2"):
        CrosscoderConfig(d_in=5, d_sae=8, d_a=2, d_b=2)
