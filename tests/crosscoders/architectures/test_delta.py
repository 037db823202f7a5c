import pytest
import torch

from tests.helpers import make_acts, make_delta, randomized, step_input


def test_the_loss_on_the_difference_agrees_with_loops() -> None:
    crosscoder, acts = make_delta(delta_loss_coefficient=0.5), make_acts(20, 12)
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    output = crosscoder.training_forward_pass(step_input(acts))
    s_a, s_b = crosscoder.input_scale.tolist()
    unit = (s_a * s_b) ** 0.5
    norms = crosscoder.selection_norms()
    total = 0.0
    for n in range(20):
        for d in range(6):
            # In raw units: the centered difference, less what the 18 latents of the difference and
            # the bias make of it.
            a, b = acts[n] - crosscoder.input_mean, crosscoder.b_dec
            error = (a[6 + d] - b[6 + d] / s_b) - (a[d] - b[d] / s_a)
            for i in range(18):
                f = output.feature_acts[n, i] / norms[i]
                error = error - f * (
                    crosscoder.W_dec[i, 6 + d] / s_b - crosscoder.W_dec[i, d] / s_a
                )
            total += (unit * error).item() ** 2
    assert output.losses["delta_loss"].item() == pytest.approx(0.5 * total / 20, rel=1e-4)


def test_the_difference_gives_shared_latents_no_gradient() -> None:
    crosscoder = make_delta()
    output = crosscoder.training_forward_pass(step_input(make_acts(20, 12)))
    output.losses["delta_loss"].backward()
    for gradient in (crosscoder.W_dec.grad, crosscoder.W_enc.grad.T):  # type: ignore[union-attr]
        assert gradient is not None
        assert (gradient[18:] == 0).all() and (gradient[:18] != 0).any()


def test_shared_latents_get_twice_the_others_budget() -> None:
    output = make_delta(k=3).training_forward_pass(step_input(make_acts(60, 12)))
    active = output.feature_acts > 0
    assert (int(active[:, :18].sum()), int(active[:, 18:].sum())) == (60, 2 * 60)


def test_on_one_model_twice_equal_decoders_leave_no_difference() -> None:
    crosscoder, x = make_delta(), make_acts(30, 6)
    crosscoder.fit_normalization(torch.cat([x, x], dim=1))
    with torch.no_grad():
        crosscoder.W_dec[:, 6:] = crosscoder.W_dec[:, :6]
        crosscoder.b_dec[6:] = crosscoder.b_dec[:6]
    output = crosscoder.training_forward_pass(step_input(torch.cat([x, x], dim=1)))
    assert output.losses["delta_loss"] < 1e-8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_b": 7}, "needs one width and one basis; got d_a=6 and d_b=7. Use dfc"),
        ({"shared_fraction": 0.0}, "leaves 24 latents for the difference"),
        ({"k_shared_ratio": 0.0}, "k_shared_ratio must be above 0"),
    ],
)
def test_what_has_no_difference_is_refused(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_delta(**overrides)
