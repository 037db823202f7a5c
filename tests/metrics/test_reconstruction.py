import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.evals import ExplainedVarianceCalculator

from sae_lens_dfc import Partition
from sae_lens_dfc.data.alignment.segments import Segment, Segments
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance, ReconstructionByRow
from sae_lens_dfc.metrics.token_frequency import (
    ExplainedVarianceByFrequency,
    paired_tokens,
    token_deciles,
)
from tests.helpers import make_acts

PARTITION = Partition(d_a=5, d_b=7, n_a_exclusive=2, n_b_exclusive=1, n_shared=3)
SCALE = torch.tensor([0.5, 3.0])


def by_row(acts: torch.Tensor, rebuilt: torch.Tensor, sizes: list[int]) -> dict[str, float]:
    metric = ReconstructionByRow(PARTITION, acts.mean(dim=0), SCALE)
    for x, y in zip(acts.split(sizes), rebuilt.split(sizes), strict=True):
        metric.update(x, y)
    return metric.compute()


def test_row_measures_are_those_of_a_loop_over_rows() -> None:
    acts = make_acts(40, 12)
    rebuilt = acts + torch.randn_like(acts)
    result = by_row(acts, rebuilt, [7, 0, 30, 3])
    mean = acts.mean(dim=0)
    for scale, (model, where) in zip(SCALE, PARTITION.models.items(), strict=True):
        errors, cosines, ratios = [], [], []
        for x, y in zip((acts - mean)[:, where], (rebuilt - mean)[:, where], strict=True):
            errors.append(((scale * x - scale * y) ** 2).sum().item())
            cosines.append((x @ y / math.sqrt(x @ x * (y @ y))).item())
            ratios.append(math.sqrt(y @ y / (x @ x)))
        for name, values in {"mse": errors, "cosine": cosines, "norm_ratio": ratios}.items():
            assert result[f"{name}/{model}"] == pytest.approx(sum(values) / 40, rel=1e-4)
            assert result[f"{name}/{model}/se"] > 0


def test_a_reconstruction_halfway_to_the_mean_has_half_the_length_however_far_the_mean() -> None:
    acts = torch.randn(50, 12, dtype=torch.double) + 1e6
    result = by_row(acts, (acts + acts.mean(dim=0)) / 2, [50])
    for model in ("a", "b"):
        assert result[f"norm_ratio/{model}"] == pytest.approx(0.5, abs=1e-6)
        assert result[f"cosine/{model}"] == pytest.approx(1, abs=1e-6)


def test_explained_variance_has_the_error_of_batches_left_out_one_by_one() -> None:
    parts = [make_acts(30, 12) for _ in range(4)]
    rebuilt = [x + torch.randn_like(x) * 3 for x in parts]
    metric = ExplainedVariance(PARTITION)
    for x, y in zip(parts, rebuilt, strict=True):
        metric.update(x, y)
    without = []
    for i in range(4):
        oracle = ExplainedVarianceCalculator()
        for j in {0, 1, 2, 3} - {i}:
            oracle.add_batch(rebuilt[j][:, :5].double(), parts[j][:, :5].double())
        without.append(oracle.compute())
    expected = torch.tensor(without, dtype=torch.double).std(correction=0).item() * math.sqrt(3)
    assert metric.compute()["explained_variance/a/se"] == pytest.approx(expected, rel=1e-4)


def test_tokens_that_come_once_each_fill_ten_equal_deciles() -> None:
    deciles = token_deciles(torch.randperm(200), d_vocab=200)
    assert torch.bincount(deciles).tolist() == [20] * 10
    assert deciles[0] == 9 and deciles[199] == 0  # of one count, high numbers are taken as rarer


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_a_decile_holds_a_tenth_of_the_rows_and_parts_of_two_tokens_at_its_ends(
    drawn: list[int],
) -> None:
    tokens = torch.tensor(drawn)
    deciles = token_deciles(tokens, d_vocab=40)
    counts = torch.bincount(tokens, minlength=40)
    for i in range(40):
        assert (deciles[counts > counts[i]] >= deciles[i]).all()
    rows = torch.bincount(deciles[tokens], minlength=10)
    # Half a token more or less at each end.
    assert (rows - len(drawn) / 10).abs().max() <= counts.max() + 1e-9
    assert (deciles[counts == 0] == 0).all()


def test_paired_tokens_are_each_segments_last_but_for_the_first_position() -> None:
    first = Segments.of([Segment((0,), ()), Segment((1,), (2,)), Segment((3, 4), (5, 6, 7))])
    second = Segments.of([Segment((0,), (9,)), Segment((8,), (3,))])
    tokens = paired_tokens([first, second])
    # B has no beginning-of-sequence token in the first: its first pair stands at position 0.
    assert {m: t.tolist() for m, t in tokens.items()} == {"a": [4, 8], "b": [7, 3]}
    assert len(paired_tokens([])["a"]) == 0


def test_a_deciles_variance_is_around_the_mean_of_all_rows() -> None:
    acts = (make_acts(300, 12) + 1000).double()
    rebuilt = acts + torch.randn_like(acts)
    deciles = {m: torch.randint(0, 10, (300,)) for m in ("a", "b")}
    deciles["a"][:150] = 3
    metric = ExplainedVarianceByFrequency(PARTITION, acts.mean(dim=0) + 5)
    for rows in torch.arange(300).split(40):
        metric.update(acts[rows], rebuilt[rows], {m: d[rows] for m, d in deciles.items()})
    result = metric.compute()
    for model, where in PARTITION.models.items():
        x, y = acts[:, where], rebuilt[:, where]
        for i in range(10):
            here = deciles[model] == i
            total = (x[here] - x.mean(dim=0)).pow(2).sum()
            expected = 1 - (x[here] - y[here]).pow(2).sum() / total
            key = f"explained_variance/{model}/token_decile_{i}"
            assert result[key] == pytest.approx(expected.item(), rel=1e-6)
    assert result["explained_variance/a/token_decile_3/se"] > 0


def test_an_empty_decile_has_no_measure_and_one_in_a_single_stretch_no_error() -> None:
    acts = make_acts(20, 12)
    metric = ExplainedVarianceByFrequency(PARTITION, acts.mean(dim=0))
    for i, rows in enumerate(torch.arange(20).split(10)):
        # A's decile 4 is all of the second batch, B's rows are all in decile 7.
        deciles = {"a": torch.full((10,), 4 * i), "b": torch.full((10,), 7)}
        metric.update(acts[rows], acts[rows] * 0.9, deciles)
    result = metric.compute()
    prefix = "explained_variance"
    assert set(result) == {
        f"{prefix}/a/token_decile_0",
        f"{prefix}/a/token_decile_4",
        f"{prefix}/b/token_decile_7",
        f"{prefix}/b/token_decile_7/se",
    }
    whole = ExplainedVariance(PARTITION)
    whole.update(acts, acts * 0.9)
    assert result[f"{prefix}/b/token_decile_7"] == pytest.approx(
        whole.compute()["explained_variance/b"]
    )
