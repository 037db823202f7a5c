import pytest
import torch

from sae_lens_dfc import DSFTrainingCrosscoder, DSFTrainingCrosscoderConfig
from tests.helpers import make_acts, make_dsf, make_mapped_dsf, step_input, train_steps


def test_the_tied_latents_get_twice_their_share_of_k_and_the_rest_what_is_left() -> None:
    output = make_dsf(k=4).training_forward_pass(step_input(make_acts(60, 12)))
    active = output.feature_acts > 0
    assert (int(active[:, :6].sum()), int(active[:, 6:].sum())) == (2 * 60, 2 * 60)


def test_both_models_errors_move_a_tied_decoder() -> None:
    crosscoder = make_dsf()
    losses = crosscoder.training_forward_pass(step_input(make_acts(60, 12))).losses
    losses["mse_loss_b"].backward()
    assert crosscoder.W_dec.grad is not None
    assert (crosscoder.W_dec.grad[:6, :6] != 0).any()  # A's side is the one decoder
    assert (crosscoder.W_dec.grad[:6, 6:] == 0).all()


def test_the_map_is_the_one_that_made_bs_activations_of_as() -> None:
    a, true_map = torch.randn(400, 5) + 3, torch.randn(5, 7)
    crosscoder = make_mapped_dsf()
    crosscoder.fit_normalization(torch.cat([a, a @ true_map + 2], dim=1))
    scale_a, scale_b = crosscoder.input_scale.tolist()
    torch.testing.assert_close(
        crosscoder.tie_map, true_map * scale_b / scale_a, rtol=1e-2, atol=1e-2
    )


def test_a_fresh_latents_encoder_is_its_decoders_transpose() -> None:
    cfg = DSFTrainingCrosscoderConfig(d_a=5, d_b=7, d_sae=24, k=6, tie="linear_map")
    crosscoder = DSFTrainingCrosscoder(cfg)
    crosscoder.fit_normalization(make_acts(100, 12))
    torch.testing.assert_close(crosscoder.W_enc, crosscoder.decoder().T)


def test_a_checkpoint_restores_the_map() -> None:
    crosscoder = train_steps(make_mapped_dsf(), make_acts(64, 12))
    other = make_mapped_dsf()
    other.load_state_dict(crosscoder.state_dict())
    assert torch.equal(other.decoder(), crosscoder.decoder())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_b": 7}, r"needs one width; got d_a=6 and d_b=7. Set tie='linear_map'"),
        ({"tied_fraction": 0.01}, "ties 0 latents"),
        ({"tied_fraction": 1.0}, "ties 24 latents"),
        ({"k_tied_multiplier": 4.0}, "gives the tied latents 100% of k"),
    ],
)
def test_a_tie_that_cannot_be_is_refused(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dsf(**overrides)


def test_a_map_from_too_few_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 10 pairs, got 9"):
        make_mapped_dsf().fit_normalization(make_acts(9, 12))
