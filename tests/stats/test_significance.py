import math

import pytest
import torch

from sae_lens_dfc.stats.significance import benjamini_hochberg, empirical_p, share_beyond


def test_p_of_draws_from_the_reference_is_uniform() -> None:
    torch.manual_seed(0)
    p = empirical_p(torch.randn(5000), torch.randn(5000))
    for level in (0.01, 0.05, 0.5):
        assert (p <= level).double().mean().item() == pytest.approx(level, abs=0.02)


def test_p_is_never_zero_and_nothing_known_is_one() -> None:
    p = empirical_p(torch.tensor([9.0, math.nan]), torch.tensor([1.0, 2.0, math.nan]))
    assert p.tolist() == [pytest.approx(1 / 3), 1.0]
    assert empirical_p(torch.tensor([9.0]), torch.zeros(0)).tolist() == [1.0]


def test_equal_values_count_as_as_large() -> None:
    assert empirical_p(torch.tensor([2.0]), torch.tensor([2.0, 2.0, 1.0])).item() == 3 / 4


def test_false_discoveries_are_as_few_as_asked_for() -> None:
    torch.manual_seed(0)
    shares: list[float] = []
    for _ in range(200):
        false, true = torch.rand(80).double(), torch.rand(20).double() * 1e-4
        found = benjamini_hochberg(torch.cat([false, true])) <= 0.1
        shares.append((found[:80].sum() / found.sum().clamp(min=1)).item())
        assert found[80:].all()
    assert sum(shares) / 200 == pytest.approx(
        0.08, abs=0.02
    )  # the level times the share that is false


def test_of_the_null_itself_a_twentieth_is_beyond() -> None:
    torch.manual_seed(0)
    values = torch.randn(10_000)
    assert share_beyond(values, values) == pytest.approx(0.05, abs=0.001)
    assert share_beyond(values + 10, values) == 1.0


def test_of_nothing_no_share_is_known() -> None:
    assert math.isnan(share_beyond(torch.zeros(0), torch.ones(3)))
    assert math.isnan(share_beyond(torch.ones(3), torch.tensor([math.nan])))
