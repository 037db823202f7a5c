import numpy as np
import pytest
import torch

from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.stitching import fit_stitching, stitching_quality

D_A, D_B = 4, 6


def related(n: int, noise: float, seed: int = 0) -> torch.Tensor:
    """B is an affine function of A and noise; both have a mean far from 0."""
    torch.manual_seed(0)
    matrix, bias = torch.randn(D_A, D_B), 50 * torch.randn(D_B)
    torch.manual_seed(1 + seed)
    a = torch.randn(n, D_A) * torch.tensor([1.0, 2.0, 3.0, 10.0]) + 100
    return torch.cat([a, a @ matrix + bias + noise * torch.randn(n, D_B)], dim=-1)


def test_moments_are_numpys_whatever_the_batches() -> None:
    acts = related(101, noise=1.0)
    moments = PairMoments.of([acts[:0], *acts.split(7)])
    torch.testing.assert_close(moments.mean.float(), acts.mean(dim=0))
    expected = np.cov(acts.double().numpy().T, bias=True)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=1e-6)


def test_an_affine_relation_is_found_and_explains_everything() -> None:
    stitching = fit_stitching(PairMoments.of([related(500, noise=0.0)]), D_A, ridge=0.0)
    held_out = related(200, noise=0.0, seed=1)
    torch.testing.assert_close(
        stitching.to_b(held_out[:, :D_A]), held_out[:, D_A:], rtol=1e-3, atol=1e-2
    )
    quality = stitching_quality(stitching, PairMoments.of([held_out]))
    assert quality["stitching/a_to_b"] == pytest.approx(1.0, abs=1e-6)


def test_without_ridge_it_is_least_squares() -> None:
    acts = related(300, noise=5.0)
    stitching = fit_stitching(PairMoments.of([acts]), D_A, ridge=0.0)
    a, b = (x - x.mean(dim=0) for x in (acts[:, :D_A].double(), acts[:, D_A:].double()))
    torch.testing.assert_close(
        stitching.a_to_b, torch.linalg.lstsq(a, b).solution.float(), rtol=1e-4, atol=1e-4
    )


def test_quality_is_the_share_of_held_out_variance_that_is_explained() -> None:
    stitching = fit_stitching(PairMoments.of([related(300, noise=5.0)]), D_A)
    held_out = related(400, noise=5.0, seed=1) + 3.0  # another mean than that of the fit
    a, b = held_out[:, :D_A], held_out[:, D_A:]
    quality = stitching_quality(stitching, PairMoments.of([held_out]))
    back = stitching.to_a(stitching.to_b(a))
    for key, guess, x in (("a_to_b", stitching.to_b(a), b), ("a_to_b_to_a", back, a)):
        explained = 1 - (guess - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
        assert quality[f"stitching/{key}"] == pytest.approx(explained.item(), rel=1e-3), key


def test_unrelated_pairs_explain_nothing() -> None:
    torch.manual_seed(0)
    stitching = fit_stitching(PairMoments.of([torch.randn(5000, 10)]), D_A)
    quality = stitching_quality(stitching, PairMoments.of([torch.randn(5000, 10)]))
    assert abs(quality["stitching/a_to_b"]) < 0.01


def test_a_direction_moves_without_the_bias() -> None:
    stitching = fit_stitching(PairMoments.of([related(500, noise=0.1)]), D_A)
    x, d = torch.randn(D_A), torch.randn(D_A)
    moved = stitching.to_b(x + d) - stitching.to_b(x)
    torch.testing.assert_close(stitching.direction_to_b(d), moved, rtol=1e-3, atol=1e-2)


def test_the_gradients_solution_is_nearer_to_an_inverse_and_never_worse_in_its_own_loss() -> None:
    acts = related(300, noise=20.0)
    moments, held_out = PairMoments.of([acts]), PairMoments.of([related(300, 20.0, seed=1)])
    ridge, gradient = (
        stitching_quality(fit_stitching(moments, D_A, method), held_out)
        for method in ("ridge", "gradient")
    )
    assert gradient["stitching/a_to_b_to_a"] > ridge["stitching/a_to_b_to_a"] + 0.01
    assert gradient["stitching/a_to_b"] < ridge["stitching/a_to_b"] + 0.01


def test_without_the_inversion_penalty_the_gradient_finds_least_squares() -> None:
    moments = PairMoments.of([related(300, noise=5.0)])
    plain = fit_stitching(moments, D_A, ridge=0.0)
    start = fit_stitching(moments, D_A, "gradient", ridge=0.3, inversion_weight=0.0)
    torch.testing.assert_close(start.a_to_b, plain.a_to_b, rtol=1e-2, atol=1e-3)


def test_no_activation_is_an_error() -> None:
    with pytest.raises(ValueError, match="No activations to take moments of"):
        PairMoments.of([torch.zeros(0, 3)])
