import pytest
import torch

from sae_lens_dfc.crosscoders.feature_acts_difference import FeatureActsDifference


def test_measures_of_a_case_worked_out_by_hand() -> None:
    # Latent 0 is exclusive and the same in both; of latent 1 the SAE finds one firing of two, and
    # invents one.
    two = torch.tensor([[1.0, 0.0], [0.0, 4.0], [3.0, 2.0], [0.0, 0.0]])
    one = torch.tensor([[1.0, 1.0], [0.0, 3.0], [3.0, 0.0], [0.0, 0.0]])
    acts = torch.tensor([[1000.0], [1002.0], [1004.0], [1006.0]])
    groups = {"a_exclusive": slice(0, 1), "shared": slice(1, 2)}
    measured = FeatureActsDifference(groups, center=torch.tensor([990.0]))
    measured.update(acts, two, one, acts + 1, acts - 2)
    assert measured.compute() == pytest.approx(
        {
            "l0/crosscoder": 1.0,
            "l0/exported": 1.0,
            # Deviations -3, -1, 1, 3: their squares add up to 20.
            "explained_variance/crosscoder": 1 - 4 / 20,
            "explained_variance/exported": 1 - 16 / 20,
            "feature_acts_explained_variance/a_exclusive": 1.0,
            "firing_precision/a_exclusive": 1.0,
            "firing_recall/a_exclusive": 1.0,
            "firing_recall_median/a_exclusive": 1.0,
            # Errors 1, 1, 2, 0; around the mean 1.5 of 0, 4, 2, 0 the squares add up to 11.
            "feature_acts_explained_variance/shared": 1 - 6 / 11,
            "firing_precision/shared": 1 / 2,
            "firing_recall/shared": 1 / 2,
            "firing_recall_median/shared": 1 / 2,
            "rows": 4,
        }
    )


def test_batches_of_any_size_give_the_same_and_a_standard_error() -> None:
    torch.manual_seed(0)
    two, noise = torch.randn(60, 4).relu(), torch.randn(60, 4)
    one, acts = (two + 0.3 * noise).relu(), torch.randn(60, 5) + 1e3
    at_once, by_part = (
        FeatureActsDifference({"shared": slice(0, 4)}, torch.zeros(5)) for _ in range(2)
    )
    at_once.update(acts, two, one, acts + 0.1, acts + 0.2)
    for i in (slice(0, 7), slice(7, 7), slice(7, 50), slice(50, 60)):
        by_part.update(acts[i], two[i], one[i], acts[i] + 0.1, acts[i] + 0.2)
    whole, parts = at_once.compute(), by_part.compute()
    assert {name: parts[name] for name in whole} == pytest.approx(whole)
    assert parts["firing_recall/shared/se"] > 0
    assert "firing_recall/shared/se" not in whole


def test_a_partition_that_never_fires_has_no_measure() -> None:
    groups = {"a_exclusive": slice(0, 1), "shared": slice(1, 2), "empty": slice(2, 2)}
    measured = FeatureActsDifference(groups, torch.zeros(1))
    code = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    for row in code.split(1):
        measured.update(row[:, :1], row, row, row[:, :1], row[:, :1])
    names = set(measured.compute())
    assert "firing_recall/shared" in names
    assert not any(name.endswith(("/a_exclusive", "/empty")) for name in names)


def test_no_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        FeatureActsDifference({"shared": slice(0, 1)}, torch.zeros(1)).compute()
