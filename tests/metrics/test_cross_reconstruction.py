import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator

from sae_lens_dfc import Crosscoder, CrosscoderConfig
from sae_lens_dfc.metrics.cross_reconstruction import CrossReconstruction, reconstructed_from
from tests.helpers import make_acts, make_firing_dfc

A_TO_B = torch.randn(5, 7)


@torch.no_grad()
def copier(n_b_exclusive: int = 0) -> Crosscoder:
    """Two models of width 2; shared latents read A's two dimensions, signs apart, and write them to
    both models."""
    cfg = CrosscoderConfig(d_in=4, d_sae=4 + n_b_exclusive, d_a=2, d_b=2)
    cfg.n_b_exclusive = n_b_exclusive
    crosscoder = Crosscoder(cfg)
    for weight in crosscoder.parameters():
        weight.zero_()
    eye = torch.eye(2)
    signs = torch.cat([eye, -eye])
    shared = crosscoder.partition.slices["shared"]
    crosscoder.W_enc[:2, shared] = signs.T
    crosscoder.W_dec[shared] = torch.cat([signs, signs], dim=1)
    return crosscoder


def measured(metric: CrossReconstruction, acts: torch.Tensor) -> dict[str, float]:
    for batch in acts.split(30):
        metric.update(batch)
    return metric.compute()


def test_a_copy_of_a_is_explained_from_a_and_not_the_other_way_round() -> None:
    a = torch.randn(90, 2)
    acts = torch.cat([a, a], dim=1)
    result = measured(CrossReconstruction(copier(), acts.mean(dim=0)), acts)
    assert result["cross_reconstruction/b_from_a"] == pytest.approx(1)
    # Nothing is read of B: A's mean is all that is known.
    assert result["cross_reconstruction/a_from_b"] == pytest.approx(0, abs=1e-6)
    assert result["cross_reconstruction/b_from_a/se"] == pytest.approx(0, abs=1e-6)
    # The map brings B's knowledge of A in.
    mapped = CrossReconstruction(copier(), acts.mean(dim=0), b_to_a=lambda b: b)
    assert measured(mapped, acts)["cross_reconstruction/a_from_b/mapped"] == pytest.approx(1)


def test_the_other_models_exclusive_latents_take_no_part_even_when_they_would_fire() -> None:
    crosscoder = copier(n_b_exclusive=2)
    with torch.no_grad():
        own = crosscoder.partition.slices["b_exclusive"]
        crosscoder.W_enc[2:, own] = torch.eye(2)
        crosscoder.b_enc[own] = 5
        crosscoder.W_dec[own, 2:] = torch.eye(2)
    a, b = torch.randn(20, 2), torch.randn(20, 2)
    acts = torch.cat([a, b], dim=1)
    assert (crosscoder.encode(acts)[:, own] > 0).any()
    rebuilt = reconstructed_from(crosscoder, "a", acts, guess=b)  # the best of all guesses
    torch.testing.assert_close(rebuilt, a)


def test_nothing_of_the_other_model_is_read() -> None:
    crosscoder = make_firing_dfc()
    acts = make_acts(30, 12)
    other = acts.clone()
    other[:, 5:] = torch.nan
    guess = torch.zeros(30, 7)
    one = reconstructed_from(crosscoder, "a", acts, guess)
    assert one.std(dim=0).min() > 0
    assert torch.equal(one, reconstructed_from(crosscoder, "a", other, guess))
    assert acts.isfinite().all()


def test_explained_variance_is_saelens_own() -> None:
    crosscoder = make_firing_dfc()
    acts = make_acts(90, 12) + 100
    means = acts.mean(dim=0) + 1
    metric = CrossReconstruction(crosscoder, means, a_to_b=lambda a: a @ A_TO_B)
    result = measured(metric, acts)
    shown = {
        "cross_reconstruction/b_from_a": means[5:].expand(90, 7),
        "cross_reconstruction/b_from_a/mapped": acts[:, :5] @ A_TO_B,
    }
    for name, guess in shown.items():
        feature_acts = crosscoder.encode(torch.cat([acts[:, :5], guess], dim=1))
        feature_acts[:, crosscoder.partition.slices["b_exclusive"]] = 0
        oracle = ExplainedVarianceCalculator()
        oracle.add_batch(crosscoder.decode(feature_acts)[:, 5:].double(), acts[:, 5:].double())
        assert result[name] == pytest.approx(oracle.compute(), rel=1e-4)
    assert "cross_reconstruction/a_from_b/mapped" not in result
