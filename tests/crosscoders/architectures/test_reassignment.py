import pytest
import torch

from sae_lens_dfc import Partition
from sae_lens_dfc.crosscoders.architectures.reassignment import Evidence, ReassignmentTest

PARTITION = Partition(d_a=3, d_b=40, n_a_exclusive=2, n_b_exclusive=0, n_shared=1)


def evidence(worth_in_b: float, noise: float, n_batches: int = 40) -> Evidence:
    """Latent 0 has a direction in B of this norm, latent 1 has none; B is noisy."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(40), dim=0)
    test = ReassignmentTest(PARTITION)
    for _ in range(n_batches):
        acts = torch.rand(200, 2) * (torch.rand(200, 2) < 0.1)
        b = worth_in_b * acts[:, :1] * direction + noise * torch.randn(200, 40)
        test.update(acts, torch.cat([torch.zeros(200, 3), b], dim=1))
    return test.compute()["a_exclusive"]


@pytest.mark.parametrize("worth", [0.0, 0.25, 1.0])
def test_the_own_share_is_the_relative_norm_a_shared_latent_would_have(worth: float) -> None:
    found = evidence(worth, noise=0.0)
    assert found.own_share[0].item() == pytest.approx(1 / (1 + worth), abs=1e-3)
    assert found.slopes[0].norm().item() == pytest.approx(worth, abs=1e-3)


def test_noise_in_the_other_model_is_no_evidence() -> None:
    found = evidence(0.0, noise=1.0)
    # The plain estimate is far from 0; the product of two halves is not.
    assert found.slopes[1].norm() > 0.3
    assert (found.own_share > 0.8).all()


def test_two_things_that_merely_have_a_mean_are_not_related() -> None:
    torch.manual_seed(0)
    test = ReassignmentTest(PARTITION)
    for _ in range(20):
        acts, b = torch.rand(500, 2), torch.rand(500, 40) + 5
        test.update(acts, torch.cat([torch.zeros(500, 3), b], dim=1))
    assert (test.compute()["a_exclusive"].own_share > 0.9).all()


def test_what_is_there_is_seen_through_noise() -> None:
    assert evidence(1.0, noise=1.0).own_share[0].item() == pytest.approx(0.5, abs=0.1)


def test_half_precision_around_it_changes_nothing() -> None:
    plain = evidence(0.25, noise=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(evidence(0.25, noise=0.1), plain)


def test_a_latent_that_fired_fewer_than_ten_times_in_a_half_is_not_judged() -> None:
    test = ReassignmentTest(PARTITION)
    for n in (10, 10):
        acts = torch.zeros(20, 2)
        acts[:n, 0], acts[: n - 1, 1] = 1, 1
        test.update(acts, torch.ones(20, 43))
    assert test.compute()["a_exclusive"].enough.tolist() == [True, False]


def test_noise_is_rarely_taken_for_the_latent_once_it_is_judged() -> None:
    torch.manual_seed(0)
    n = 400
    partition = Partition(d_a=1, d_b=64, n_a_exclusive=n, n_b_exclusive=0, n_shared=1)
    test = ReassignmentTest(partition)
    for _ in range(
        2
    ):  # each latent fires ten times in each half; B is noise of the latent's own size
        acts = torch.eye(n).repeat(10, 1)
        test.update(acts, torch.cat([torch.zeros(10 * n, 1), torch.randn(10 * n, 64) / 8], dim=1))
    found = test.compute()["a_exclusive"]
    assert found.enough.all() and (found.own_share < 0.8).float().mean() < 0.01


def test_one_batch_is_not_enough() -> None:
    test = ReassignmentTest(PARTITION)
    test.update(torch.ones(1, 2), torch.ones(1, 43))
    with pytest.raises(ValueError, match="needs at least two batches, got 1"):
        test.compute()
