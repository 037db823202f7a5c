import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.evals import ExplainedVarianceCalculator

from sae_lens_dfc import Partition
from sae_lens_dfc.metrics.exclusivity.decoders import (
    decoder_metrics,
    relative_decoder_norms,
    relative_norm_histogram,
)
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance
from sae_lens_dfc.metrics.sparsity import ActivationStats
from tests.helpers import make_acts, make_batchtopk, make_dfc, train_steps

PARTITION = Partition(d_a=5, d_b=7, n_a_exclusive=2, n_b_exclusive=1, n_shared=3)


@pytest.mark.slow
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_explained_variance_is_saelens_own_for_each_model_however_batched(sizes: list[int]) -> None:
    acts = make_acts(sum(sizes), 12) + 1000  # a mean far above the spread, as in Gemma
    reconstruction = acts + torch.randn_like(acts)
    metric = ExplainedVariance(PARTITION)
    for x, y in zip(acts.split(sizes), reconstruction.split(sizes), strict=True):
        metric.update(x, y)
    for model, inputs in PARTITION.models.items():
        oracle = ExplainedVarianceCalculator()
        oracle.add_batch(reconstruction[:, inputs].double(), acts[:, inputs].double())
        assert metric.compute()[f"explained_variance/{model}"] == pytest.approx(
            oracle.compute(), abs=1e-6
        )


def test_median_over_dimensions_is_not_ruled_by_the_largest() -> None:
    acts = torch.randn(500, 12)
    acts[:, 0] *= 100
    reconstruction = torch.zeros_like(acts) + acts.mean(dim=0)
    reconstruction[:, 0] = acts[:, 0]
    metric = ExplainedVariance(PARTITION)
    metric.update(acts, reconstruction)
    result = metric.compute()
    assert result["explained_variance/a"] > 0.99
    assert result["explained_variance_median/a"] == pytest.approx(0, abs=1e-6)


def test_no_pair_is_no_number() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        ExplainedVariance(PARTITION).compute()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_firing_counts_agree_with_a_dense_count(sizes: list[int]) -> None:
    acts = torch.randn(sum(sizes), 6).relu()
    acts[:, 2] = 0  # B's only latent is dead
    metric = ActivationStats(PARTITION)
    for batch in acts.split(sizes):
        metric.update(batch)
    result = metric.compute()
    assert result["l0"] == pytest.approx((acts > 0).sum(dim=1).float().mean().item())
    assert result["l0/shared"] == pytest.approx((acts[:, 3:] > 0).sum(dim=1).float().mean().item())
    assert result["dead_fraction/b_exclusive"] == 1
    assert torch.equal(metric.maxima, acts.max(dim=0).values)
    torch.testing.assert_close(
        metric.means * metric.counts, acts.double().sum(dim=0), atol=1e-5, rtol=1e-5
    )


def test_relative_decoder_norm_is_one_for_a_and_zero_for_b() -> None:
    acts = make_acts(64, 12)
    acts[:, :5] *= 1000  # raw sizes differ by a thousand; the norm is on the scale of training
    crosscoder = train_steps(make_dfc(), acts).to_inference()
    relative = relative_decoder_norms(crosscoder)
    slices = crosscoder.partition.slices
    assert (relative[slices["a_exclusive"]] == 1).all()
    assert (relative[slices["b_exclusive"]] == 0).all()
    assert (relative[slices["shared"]] - 0.5).abs().max() < 0.4


def test_histogram_counts_every_latent_once() -> None:
    crosscoder = make_dfc().to_inference()
    histogram = relative_norm_histogram(crosscoder)
    assert {name: sum(bins) for name, bins in histogram.items()} == crosscoder.partition.sizes
    assert histogram["a_exclusive"][-1] == 6 and histogram["b_exclusive"][0] == 4


def test_leak_of_a_sound_crosscoder_is_exactly_zero_and_of_a_broken_one_is_not() -> None:
    crosscoder = make_dfc().to_inference()
    assert decoder_metrics(crosscoder)["max_forbidden_weight"] == 0
    with torch.no_grad():
        crosscoder.W_dec[0, 11] = 1e-9
    assert decoder_metrics(crosscoder)["max_forbidden_weight"] == pytest.approx(1e-9)


def test_pca_agrees_with_torch_on_normalized_data() -> None:
    partition = make_batchtopk().partition
    mix = torch.randn(12, 12)
    acts = make_acts(400, 12) @ mix
    pca = JointPCA.fit(acts.split(50), partition, k=3)
    centered = acts - acts.mean(dim=0)
    for inputs in partition.models.values():
        centered[:, inputs] /= centered[:, inputs].pow(2).sum(dim=1).mean().sqrt()
    _, _, V = torch.linalg.svd(centered, full_matrices=False)
    expected = centered @ V[:3].T @ V[:3]
    ours = (pca.reconstruct(acts) - pca.mean) * pca.scale
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_pca_with_all_components_rebuilds_everything() -> None:
    acts = make_acts(100, 12)
    pca = JointPCA.fit([acts], make_batchtopk().partition, k=12)
    torch.testing.assert_close(pca.reconstruct(acts), acts, atol=1e-2, rtol=1e-4)
