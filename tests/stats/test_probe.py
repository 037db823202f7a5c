"""A probe predicts what is a function of its input, and nothing else."""

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.stats.probe import ProbeOptions, Rows, fit_probe

OPTIONS = ProbeOptions(hidden=128, steps=600, batch=256, lr=5e-3, n_first=2000)


def explained(probe_of: Tensor, y: Tensor) -> float:
    return 1 - ((y - probe_of).pow(2).mean() / y.var()).item()


def fitted_and_measured(
    function: str, scale: float = 1.0, options: ProbeOptions = OPTIONS
) -> float:
    """Share of a target's variance that the probe explains on new rows."""
    generator = torch.Generator().manual_seed(0)

    def sample(n: int) -> Rows:
        x = torch.randn(n, 3, generator=generator)
        noise = torch.randn(n, generator=generator)
        y = {
            "linear": x[:, 0] - 2 * x[:, 1],
            "product": x[:, 0] * x[:, 1],
            "half noise": x[:, 0] + noise,
            "noise": noise,
        }[function]
        return Rows(scale * x, scale * y[:, None], scale * y[:, None])

    probe = fit_probe(sample, options)
    acts, _, y = sample(4000)
    return explained(probe(acts)[:, 0], probe.standardized(y)[:, 0])


@pytest.mark.slow
def test_a_linear_target_is_explained() -> None:
    assert fitted_and_measured("linear") > 0.98


def test_a_product_of_inputs_is_explained_though_no_linear_map_can() -> None:
    assert fitted_and_measured("product") > 0.7


@pytest.mark.slow
def test_of_a_noisy_target_the_share_that_is_no_noise_is_explained() -> None:
    assert fitted_and_measured("half noise") == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_noise_is_not_explained() -> None:
    assert fitted_and_measured("noise") < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_inputs_and_targets_does_not_matter(scale: float) -> None:
    assert fitted_and_measured("product", scale) == pytest.approx(
        fitted_and_measured("product"), abs=0.02
    )


def test_a_latent_that_is_a_threshold_of_a_linear_score_is_explained_without_training() -> None:
    """The step of a JumpReLU, at a level that 5 % of the rows exceed."""
    generator = torch.Generator().manual_seed(0)

    def sample(n: int) -> Rows:
        x = torch.randn(n, 10, generator=generator)
        score = x @ torch.arange(10.0)[:, None]
        return Rows(x, score, score.where(score > 1.645 * 16.88, 0.0))

    probe = fit_probe(sample, ProbeOptions(steps=0, n_first=4000))
    acts, _, y = sample(4000)
    assert explained(probe(acts)[:, 0], probe.standardized(y)[:, 0]) > 0.85


def test_a_constant_input_or_target_is_taken_to_be_zero() -> None:
    def sample(n: int) -> Rows:
        constant = torch.full((n, 1), 5.0)
        return Rows(torch.full((n, 2), 3.0), constant, constant)

    probe = fit_probe(sample, ProbeOptions(hidden=4, steps=5, batch=8))
    acts, _, y = sample(3)
    assert probe.standardized(y).tolist() == [[0.0]] * 3
    assert probe(acts).abs().max() < 0.1


def test_without_targets_there_is_nothing_to_fit() -> None:
    nothing = torch.zeros(2000, 0)
    probe = fit_probe(lambda n: Rows(torch.randn(n, 2), nothing[:n], nothing[:n]), OPTIONS)
    assert probe(torch.randn(3, 2)).shape == (3, 0)


@pytest.mark.slow
def test_the_fit_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    assert fitted_and_measured("half noise") == fitted_and_measured("half noise")
    assert torch.equal(before, torch.random.get_rng_state())
