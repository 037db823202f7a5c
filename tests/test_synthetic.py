import time
from itertools import islice
from typing import Any

import pytest
import torch

from sae_lens_dfc import ToyPair, ToyPairConfig


def toy(**overrides: Any) -> ToyPair:
    defaults: dict[str, Any] = {
        "n_features": 200,
        "d_a": 24,
        "d_b": 32,
        "a_exclusive_fraction": 0.1,
        "b_exclusive_fraction": 0.05,
    }
    return ToyPair(ToyPairConfig(**{**defaults, **overrides}))


def sample(pair: ToyPair, n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    return next(pair.batches_with_features(n, seed=1))


def test_a_model_has_no_direction_for_the_others_features() -> None:
    pair = toy()
    slices, models = pair.features.slices, pair.features.models
    a, b = (pair.directions[:, models[m]].norm(dim=1) for m in ("a", "b"))
    assert {name: s.stop - s.start for name, s in slices.items()} == {
        "a_exclusive": 20,
        "b_exclusive": 10,
        "shared": 170,
    }
    assert (b[slices["a_exclusive"]] == 0).all() and (a[slices["b_exclusive"]] == 0).all()
    assert (a[slices["shared"]] > 0).all() and (b[slices["shared"]] > 0).all()


def test_activations_are_the_directions_of_the_active_features_and_noise() -> None:
    pair = toy(noise=0.05)
    acts, feature_acts = sample(pair)
    rest = acts - feature_acts @ pair.directions
    assert rest.std().item() == pytest.approx(0.05, rel=0.01)
    exact = toy(noise=0.0)
    acts, feature_acts = sample(exact)
    torch.testing.assert_close(acts, feature_acts @ exact.directions)


def test_bs_directions_are_one_affine_map_of_as_and_noise_where_asked_for() -> None:
    def unexplained(**overrides: Any) -> float:
        pair = toy(d_a=16, d_b=20, b_exclusive_fraction=0.0, **overrides)
        shared = pair.directions[pair.features.slices["shared"]]
        x = torch.cat([shared[:, :16], torch.ones(len(shared), 1)], dim=1)
        y = shared[:, 16:]
        residual = y - x @ torch.linalg.lstsq(x, y).solution
        return (residual.norm() / y.norm()).item()

    assert unexplained() < 1e-5
    assert 0.25 < unexplained(map_noise=0.4) < 0.45


def test_bs_directions_have_as_median_norm() -> None:
    b = toy().directions[:, 24:].norm(dim=1)
    assert b[b > 0].median().item() == pytest.approx(1, abs=0.05)


def test_features_fire_as_often_as_their_frequency_says() -> None:
    pair = toy(active_features=6, min_frequency=1e-3)
    assert pair.frequencies.sum().item() == pytest.approx(6, rel=1e-4)
    assert pair.frequencies.min() >= 1e-3
    _, feature_acts = sample(pair)
    rates = (feature_acts > 0).double().mean(dim=0)
    error = (rates - pair.frequencies).abs() / (pair.frequencies / 20_000).sqrt()
    assert error.max() < 6  # standard errors; silent rows, 0.2 % of all, are given a feature


def test_frequencies_have_a_long_tail_where_asked_for() -> None:
    def ratio(decay: float) -> float:
        p = toy(frequency_decay=decay).frequencies
        return (p.quantile(0.9) / p.quantile(0.1)).item()

    assert ratio(0.05) > 5 * ratio(0.0)


@pytest.mark.parametrize("decay", [0.001, 0.05])
def test_frequencies_add_up_however_long_the_tail(decay: float) -> None:
    pair = ToyPair(ToyPairConfig(frequency_decay=decay))
    assert pair.frequencies.sum().item() == pytest.approx(5, rel=1e-4)


def test_frequencies_vary_by_common_causes_and_by_features_own() -> None:
    def spread(**overrides: Any) -> float:
        p = toy(frequency_decay=0.0, min_frequency=1e-6, **overrides).frequencies
        return (p / (1 - p)).log().std().item()

    none = {"frequency_variance": 0.0, "frequency_factor_variance": 0.0}
    assert spread(**none) < 0.01
    own, common = (
        spread(**{**none, "frequency_variance": 1.0}),
        spread(**{**none, "frequency_factor_variance": 0.3}),
    )
    assert own > 0.3 and common > 0.3


def test_the_map_adds_one_vector_to_all_of_bs_directions() -> None:
    def common(map_bias: float) -> float:
        pair = toy(map_bias=map_bias)
        b = pair.directions[pair.features.slices["shared"], 24:]
        return b.mean(dim=0).norm().item()

    assert common(0.0) < 0.25 and common(2.0) > 0.8


def test_a_feature_is_active_in_every_row_with_strengths_in_the_range() -> None:
    _, feature_acts = sample(toy(active_features=1, min_magnitude=0.5, max_magnitude=2.0))
    assert ((feature_acts > 0).sum(dim=1) >= 1).all()
    strengths = feature_acts[feature_acts > 0]
    assert 0.5 <= strengths.min() < 0.51 and 1.99 < strengths.max() <= 2.0


def test_firing_is_correlated_only_where_asked_for() -> None:
    def largest_correlation(scale: float) -> float:
        _, feature_acts = sample(toy(active_features=40, firing_correlation=scale))
        fired = (feature_acts > 0).float()
        correlation = torch.corrcoef(fired.T).nan_to_num() - torch.eye(200)
        return correlation.abs().max().item()

    assert largest_correlation(0.0) < 0.06 < 0.2 < largest_correlation(0.25)


def test_pairing_noise_is_the_share_of_rows_whose_b_side_is_anothers() -> None:
    pair = toy(pairing_noise=0.3, noise=0.0)
    acts, feature_acts = sample(pair)
    right = feature_acts @ pair.directions
    assert torch.allclose(acts[:, :24], right[:, :24], atol=1e-6)
    wrong = ((acts[:, 24:] - right[:, 24:]).abs() > 1e-4).any(dim=1)
    assert wrong.double().mean().item() == pytest.approx(0.3, abs=0.02)


def test_samples_depend_on_the_seed_alone_and_leave_torchs_state_be() -> None:
    one, again, other = (toy().batches(64, seed) for seed in (0, 0, 1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(islice(one, 3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert all(map(torch.equal, first, islice(again, 3)))
    assert not torch.equal(first[0], next(other)) and not torch.equal(first[0], first[1])


def test_another_seed_makes_another_pair() -> None:
    assert not torch.equal(toy(seed=0).directions, toy(seed=1).directions)
    assert torch.equal(toy(seed=0).directions, toy(seed=0).directions)


def test_two_million_samples_take_less_than_a_minute_of_one_core() -> None:
    batches = ToyPair(ToyPairConfig(n_features=512, d_a=128, d_b=128)).batches(1024)
    next(batches)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()  # other work on the machine does not count
        for _ in islice(batches, 64):
            pass
        seconds = time.process_time() - started
    finally:
        torch.set_num_threads(n_threads)
    assert 64 * 1024 * 60 / seconds > 2e6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_features": 0}, "n_features must be above 0"),
        ({"pairing_noise": 1.5}, r"pairing_noise must be at least 0 and at most 1, got 1.5"),
        ({"a_exclusive_fraction": 0.6, "b_exclusive_fraction": 0.6}, "smaller than its exclusive"),
        ({"noise": -1.0}, "noise must be at least 0, got -1.0"),
        ({"frequency_variance": -1.0}, "frequency_variance must be at least 0"),
        ({"min_frequency": -1.0}, "min_frequency must be above 0"),
        ({"min_magnitude": 2.0}, "min_magnitude must be at least 0 and at most max_magnitude"),
        (
            {"active_features": 300},
            r"active_features=300 must lie between .* and n_features \(200\)",
        ),
    ],
)
def test_a_pair_that_cannot_be_is_refused(overrides: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(**overrides)
