import math

import pytest
import torch

from sae_lens_dfc.stats.significance import benjamini_hochberg, share_beyond


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
