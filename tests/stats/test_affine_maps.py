import numpy as np
import pytest
import torch

from sae_lens_dfc.stats.affine_maps import affine_map_quality, fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments

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
    affine_maps = fit_affine_maps(PairMoments.of([related(500, noise=0.0)]), D_A, ridge=0.0)
    held_out = related(200, noise=0.0, seed=1)
    torch.testing.assert_close(
        affine_maps.to_b(held_out[:, :D_A]), held_out[:, D_A:], rtol=1e-3, atol=1e-2
    )
    quality = affine_map_quality(affine_maps, PairMoments.of([held_out]))
    assert quality["affine_map/a_to_b"] == pytest.approx(1.0, abs=1e-6)


def test_without_ridge_it_is_least_squares() -> None:
    acts = related(300, noise=5.0)
    affine_maps = fit_affine_maps(PairMoments.of([acts]), D_A, ridge=0.0)
    a, b = (x - x.mean(dim=0) for x in (acts[:, :D_A].double(), acts[:, D_A:].double()))
    torch.testing.assert_close(
        affine_maps.a_to_b, torch.linalg.lstsq(a, b).solution.float(), rtol=1e-4, atol=1e-4
    )


def test_quality_is_the_share_of_held_out_variance_that_is_explained() -> None:
    affine_maps = fit_affine_maps(PairMoments.of([related(300, noise=5.0)]), D_A)
    held_out = related(400, noise=5.0, seed=1) + 3.0  # another mean than that of the fit
    a, b = held_out[:, :D_A], held_out[:, D_A:]
    quality = affine_map_quality(affine_maps, PairMoments.of([held_out]))
    back = affine_maps.to_a(affine_maps.to_b(a))
    for key, guess, x in (("a_to_b", affine_maps.to_b(a), b), ("a_to_b_to_a", back, a)):
        explained = 1 - (guess - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
        assert quality[f"affine_map/{key}"] == pytest.approx(explained.item(), rel=1e-3), key


def test_unrelated_pairs_explain_nothing() -> None:
    torch.manual_seed(0)
    affine_maps = fit_affine_maps(PairMoments.of([torch.randn(5000, 10)]), D_A)
    quality = affine_map_quality(affine_maps, PairMoments.of([torch.randn(5000, 10)]))
    assert abs(quality["affine_map/a_to_b"]) < 0.01


def test_a_direction_moves_without_the_bias() -> None:
    affine_maps = fit_affine_maps(PairMoments.of([related(500, noise=0.1)]), D_A)
    x, d = torch.randn(D_A), torch.randn(D_A)
    moved = affine_maps.to_b(x + d) - affine_maps.to_b(x)
    torch.testing.assert_close(affine_maps.direction_to_b(d), moved, rtol=1e-3, atol=1e-2)


def test_no_activation_is_an_error() -> None:
    with pytest.raises(ValueError, match="No activations to take moments of"):
        PairMoments.of([torch.zeros(0, 3)])
