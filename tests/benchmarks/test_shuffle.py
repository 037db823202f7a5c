import pytest
import torch

from benchmarks.data import order_measures


def test_a_uniform_order_measures_as_uniform() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        measures = order_measures(torch.randperm(20_000), batch_size=500)
        assert abs(measures["rank_correlation"]) < 4 * measures["rank_correlation_std"]
        assert abs(measures["clustering"] - 1) < 4 * measures["clustering_std"]


def test_the_order_of_the_text_and_its_reverse_correlate_fully() -> None:
    order = torch.arange(1000)
    assert order_measures(order, 100)["rank_correlation"] == pytest.approx(1)
    assert order_measures(order.flip(0), 100)["rank_correlation"] == pytest.approx(-1)


def test_neighbors_that_come_together_are_seen_although_nothing_correlates() -> None:
    torch.manual_seed(0)
    # Stretches of 100 rows in a random order, the rows in each in a random order.
    order = torch.cat([i * 100 + torch.randperm(100) for i in torch.randperm(100)])
    measures = order_measures(order, batch_size=100, n_blocks=100)
    assert abs(measures["rank_correlation"]) < 0.3
    assert measures["clustering"] > 50


def test_clustering_of_a_hand_made_order_is_the_variance_over_its_expectation() -> None:
    # Two batches of two, each from one of two stretches: counts are 2 and 0 where 1 and 1 are
    # expected, so the variance is 1; that of a uniform draw of 2 from 4 is 2 * 1/2 * 1/2 * (4 - 2)
    # / (4 - 1) = 1/3.
    assert order_measures(torch.arange(4), 2, n_blocks=2)["clustering"] == pytest.approx(3)


@pytest.mark.parametrize("order", [[0, 0, 1, 2], [1, 2, 3, 4]])
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="must contain each of 0 to 3 once"):
        order_measures(torch.tensor(order), 2, n_blocks=2)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows are too few for batches of 6"):
        order_measures(torch.randperm(10), 6, n_blocks=2)
