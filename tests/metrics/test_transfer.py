import pytest
import torch
from scipy.stats import mannwhitneyu

from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.stitching import Stitching, fit_stitching
from sae_lens_dfc.metrics.transfer import Transfer
from tests.helpers import make_firing_dfc

D_A = 5


def acts_and_map(n: int = 600) -> tuple[torch.Tensor, Stitching]:
    torch.manual_seed(0)
    a = torch.randn(n, D_A)
    acts = torch.cat([a, a @ torch.randn(D_A, 7) + 2 * torch.randn(n, 7) - 5], dim=-1)
    return acts, fit_stitching(PairMoments.of([acts]), D_A)


@torch.no_grad()
def test_auc_and_r2_are_those_of_the_encoder_on_bs_mapped_activations() -> None:
    acts, stitching = acts_and_map()
    crosscoder = make_firing_dfc()
    transfer = Transfer(crosscoder, stitching)
    for batch in acts.split(100):
        transfer.update(batch)
    found = transfer.compute()
    fires, judged = crosscoder.encode(acts), 0
    for j in range(crosscoder.partition.sizes["a_exclusive"]):
        mapped = stitching.to_a(acts[:, D_A:]) - crosscoder.b_dec[:D_A]
        guess = mapped @ crosscoder.W_enc[:D_A, j] + crosscoder.b_enc[j]
        on, off = guess[fires[:, j] > 0], guess[fires[:, j] == 0]
        assert found["firings"][j] == len(on)
        if len(on) and len(off):
            judged += 1
            u = mannwhitneyu(on.numpy(), off.numpy()).statistic / (len(on) * len(off))
            assert found["auc"][j].item() == pytest.approx(u, abs=0.01)
            r = torch.stack([guess.clamp(min=0), fires[:, j]]).corrcoef()[0, 1]
            assert found["r2"][j].item() == pytest.approx(r.item() ** 2, abs=1e-3)
    assert judged >= 4


@torch.no_grad()
def test_what_is_predicted_does_not_depend_on_what_it_is_predicted_from() -> None:
    """A shared latent reads both models: with B on both sides its firing would be told by itself."""
    acts, stitching = acts_and_map()
    crosscoder = make_firing_dfc()
    changed = acts.clone()
    changed[:, D_A:] = torch.randn(len(acts), 7)
    one, other = Transfer(crosscoder, stitching), Transfer(crosscoder, stitching)
    one.update(acts)
    other.update(changed)
    from sae_lens_dfc.metrics.scaling import owned_by_a

    is_a = owned_by_a(crosscoder)
    assert torch.equal(one.compute()["firings"][is_a], other.compute()["firings"][is_a])


def test_batches_of_any_size_count_the_same() -> None:
    acts, stitching = acts_and_map()
    crosscoder = make_firing_dfc()
    one, other = Transfer(crosscoder, stitching), Transfer(crosscoder, stitching)
    one.update(acts)
    for batch in (acts[:300], acts[:0], acts[300:]):
        other.update(batch)
    for name, value in one.compute().items():
        torch.testing.assert_close(
            other.compute()[name], value, rtol=1e-3, atol=0.02, equal_nan=True
        )


def test_models_with_nothing_in_common_tell_nothing() -> None:
    torch.manual_seed(0)
    acts = torch.randn(20_000, 12)
    stitching = fit_stitching(PairMoments.of([torch.randn(5000, 12)]), D_A)
    transfer = Transfer(make_firing_dfc(), stitching)
    transfer.update(acts)
    found = transfer.compute()
    often = found["firings"] > 1000
    assert often.sum() > 5
    assert (found["auc"][often] - 0.5).abs().max() < 0.06


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        Transfer(make_firing_dfc(), acts_and_map(50)[1]).compute()
