from collections.abc import Sequence

import pytest
import torch
from scipy.stats import mannwhitneyu

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.metrics.exclusivity.transfer import Transfer
from sae_lens_dfc.stats.affine_maps import AffineMaps, fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments
from tests.helpers import make_firing_dfc

D_A = 5


def acts_and_map(n: int = 600) -> tuple[torch.Tensor, AffineMaps]:
    torch.manual_seed(0)
    a = torch.randn(n, D_A)
    acts = torch.cat([a, a @ torch.randn(D_A, 7) + 2 * torch.randn(n, 7) - 5], dim=-1)
    return acts, fit_affine_maps(PairMoments.of([acts]), D_A)


def transferred(
    crosscoder: Crosscoder, affine_maps: AffineMaps, batches: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    transfer = Transfer(crosscoder, affine_maps)
    for batch in batches:
        transfer.calibrate(batch, crosscoder.encode(batch))
    for batch in batches:
        transfer.update(batch)
    return transfer.compute()


@torch.no_grad()
def test_auc_and_r2_are_those_of_the_encoder_on_bs_mapped_activations() -> None:
    acts, affine_maps = acts_and_map(4000)
    crosscoder = make_firing_dfc()
    found = transferred(crosscoder, affine_maps, acts.split(400))
    fires, judged = crosscoder.encode(acts), 0
    for j in range(crosscoder.partition.sizes["a_exclusive"]):
        mapped = affine_maps.to_a(acts[:, D_A:]) - crosscoder.b_dec[:D_A]
        guess = mapped @ crosscoder.W_enc[:D_A, j]
        on, off = guess[fires[:, j] > 0], guess[fires[:, j] == 0]
        # A bin of 1/8 standard deviation holds at most a twentieth of a normal distribution.
        assert found["firings"][j].item() == pytest.approx(len(on), abs=200)
        if min(len(on), len(off)) > 200:
            judged += 1
            u = mannwhitneyu(on.numpy(), off.numpy()).statistic / (len(on) * len(off))
            assert found["auc"][j].item() == pytest.approx(u, abs=0.02)
    assert judged >= 4


@torch.no_grad()
def test_a_shared_latent_is_predicted_as_an_exclusive_one_is() -> None:
    """By its source block and the map alone: what it reads of its target takes no part but in how
    often it fires."""
    acts, affine_maps = acts_and_map(2000)
    shared, blind = make_firing_dfc(), make_firing_dfc()
    blind.load_state_dict(shared.state_dict())
    is_a = owned_by_a(shared)
    blind.W_enc[D_A:, is_a] = 0
    fires = shared.encode(acts)

    def of(crosscoder: Crosscoder) -> dict[str, torch.Tensor]:
        transfer = Transfer(crosscoder, affine_maps)
        transfer.calibrate(acts, fires)
        transfer.update(acts)
        return transfer.compute()

    for name, value in of(shared).items():
        assert torch.equal(of(blind)[name][is_a].nan_to_num(-1), value[is_a].nan_to_num(-1)), name


@torch.no_grad()
def test_what_is_to_be_predicted_does_not_depend_on_what_predicts_it() -> None:
    acts, affine_maps = acts_and_map(2000)
    crosscoder = make_firing_dfc()
    fires, is_a = crosscoder.encode(acts), owned_by_a(crosscoder)
    changed = acts.clone()
    changed[:, D_A:] = torch.randn(len(acts), 7)
    firings: list[torch.Tensor] = []
    for x in (acts, changed):
        transfer = Transfer(crosscoder, affine_maps)
        transfer.calibrate(x, fires)
        transfer.update(x)
        firings.append(transfer.compute()["firings"][is_a])
    assert torch.equal(*firings)


@torch.no_grad()
def test_batches_of_any_size_count_the_same() -> None:
    acts, affine_maps = acts_and_map(3000)
    crosscoder = make_firing_dfc()
    one = transferred(crosscoder, affine_maps, [acts])
    other = transferred(crosscoder, affine_maps, [acts[:1], acts[:0], acts[1:700], acts[700:]])
    often = (one["firings"] > 300) & (one["firings"] < 2700)
    # Bins lie where the first pairs put them.
    assert (other["auc"] - one["auc"])[often].abs().max() < 0.03
    assert (other["firings"] / one["firings"])[often].log().abs().max() < 0.4


@torch.no_grad()
def test_models_with_nothing_in_common_tell_nothing() -> None:
    torch.manual_seed(0)
    acts = torch.randn(20_000, 12)
    affine_maps = fit_affine_maps(PairMoments.of([torch.randn(5000, 12)]), D_A)
    found = transferred(make_firing_dfc(), affine_maps, acts.split(2000))
    often = found["firings"] > 1000
    assert often.sum() > 5
    assert (found["auc"][often] - 0.5).abs().max() < 0.06


@torch.no_grad()
def test_a_latent_that_never_fires_is_never_told() -> None:
    acts, affine_maps = acts_and_map(1000)
    crosscoder = make_firing_dfc()
    crosscoder.threshold.fill_(1e9)
    found = transferred(crosscoder, affine_maps, [acts])
    assert found["firings"].sum() == 0 and found["auc"].isnan().all() and found["r2"].isnan().all()


def test_nothing_counted_is_an_error() -> None:
    acts, affine_maps = acts_and_map(50)
    with pytest.raises(ValueError, match="No pair was evaluated"):
        Transfer(make_firing_dfc(), affine_maps).compute()
    with pytest.raises(ValueError, match="calibrated on the same batches first"):
        Transfer(make_firing_dfc(), affine_maps).update(acts)
