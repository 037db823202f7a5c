import pytest

from tests.helpers import (
    make_acts,
    make_batchtopk,
    make_delta,
    make_dsf,
    step_input,
    train_steps,
)


def test_k_falls_on_a_line_from_its_first_value_to_its_last() -> None:
    crosscoder, acts = make_batchtopk(k=2, k_initial=10, k_anneal_steps=4), make_acts(50, 12)
    active: list[float] = []
    for step in range(6):
        output = crosscoder.training_forward_pass(step_input(acts, step=step))
        active.append((output.feature_acts > 0).sum().item() / 50)
    assert active == [10, 8, 6, 4, 2, 2]


def test_a_group_never_keeps_more_than_all_of_its_latents() -> None:
    # Twice their share of k = 24 would be 12 of the 6 tied latents.
    crosscoder = make_dsf(k=6, k_initial=24, k_anneal_steps=10)
    output = crosscoder.training_forward_pass(step_input(make_acts(50, 12)))
    assert (output.feature_acts[:, :6] > 0).sum(dim=1).max() <= 6


def test_a_group_that_never_kept_a_latent_stays_silent_after_training() -> None:
    crosscoder = make_delta(k=0.04)  # 16 rows x 0.04 / 3 is less than one latent of the difference
    acts = make_acts(16, 12)
    train_steps(crosscoder, acts)
    saved = crosscoder.to_inference()
    assert (saved.encode(acts)[:, :18] == 0).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"k_initial": 10}, "Annealing needs both k_initial and k_anneal_steps"),
        ({"k_anneal_steps": 10}, "Annealing needs both"),
        ({"k_initial": 25, "k_anneal_steps": 5}, "k_initial=25 and d_sae=24"),
    ],
)
def test_half_an_annealing_is_refused(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_batchtopk(**overrides)
