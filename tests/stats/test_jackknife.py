import math

import pytest
import torch

from sae_lens_dfc.stats.jackknife import Jackknife, Sums


def mean_and_variance(sums: Sums) -> dict[str, float]:
    mean = (sums["x"] / sums["n"]).item()
    return {"mean": mean, "variance": (sums["xx"] / sums["n"]).item() - mean**2}


def counted(values: torch.Tensor) -> Jackknife:
    metric = Jackknife(mean_and_variance)
    for batch in values:
        n = torch.tensor(float(len(batch)))
        metric.update({"x": batch.sum(), "xx": batch.pow(2).sum(), "n": n})
    return metric


def test_a_means_error_is_the_textbooks() -> None:
    values = torch.randn(10, 1, dtype=torch.double)
    result = counted(values).compute()
    assert result["mean"] == pytest.approx(values.mean().item())
    assert result["mean/se"] == pytest.approx(values.std().item() / math.sqrt(10))


@pytest.mark.slow
def test_the_error_covers_the_truth_about_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    within = 0
    for _ in range(400):
        result = counted(torch.randn(20, 50, dtype=torch.double)).compute()
        within += abs(result["variance"] - 1) < 2.26 * result["variance/se"]  # t with 9 degrees
    assert 0.90 <= within / 400 <= 0.98


def test_one_batch_has_no_spread() -> None:
    assert set(counted(torch.randn(1, 5)).compute()) == {"mean", "variance"}


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        Jackknife(mean_and_variance).compute()
