import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_dfc.data.activations import N_NORMS, RunningMedian
from sae_lens_dfc.data.cache.norms import NormStatistics

NORMS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40)


@given(st.lists(NORMS, min_size=1, max_size=4))
def test_statistics_of_parts_are_those_of_the_whole(parts: list[list[float]]) -> None:
    statistics = NormStatistics()
    for part in parts:
        statistics.update(torch.tensor(part, dtype=torch.double))
    whole = torch.tensor([x for part in parts for x in part], dtype=torch.double)
    assert statistics.n == len(whole)
    assert statistics.mean == pytest.approx(float(whole.mean()))
    if len(whole) > 1:
        assert statistics.std == pytest.approx(float(whole.std()), rel=1e-6, abs=1e-6)


@given(NORMS, NORMS)
def test_statistics_come_back_from_their_state(one: list[float], other: list[float]) -> None:
    statistics = NormStatistics()
    statistics.update(torch.tensor(one))
    again = NormStatistics.of(statistics.state())
    for s in (statistics, again):
        s.update(torch.tensor(other))
    assert torch.equal(statistics.state(), again.state())


def test_the_running_median_forgets_what_is_old() -> None:
    median = RunningMedian()
    assert median.compute() == 0
    median.update(torch.zeros(N_NORMS))
    median.update(torch.ones(N_NORMS // 2 + 1))
    assert median.compute() == 1
    assert len(median.values) == N_NORMS
