import pytest
import torch
from torch.nn.functional import normalize

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.latent_scaling import LatentScaling, directions, owned_by_a
from sae_lens_dfc.stats.affine_maps import AffineMaps
from tests.helpers import make_acts, make_batchtopk, make_firing_dfc, train_steps

D_A, D_B = 5, 7


def a_map() -> AffineMaps:
    return AffineMaps(
        torch.zeros(D_A), torch.zeros(D_B), torch.randn(D_A, D_B), torch.randn(D_B, D_A)
    )


def scaled(crosscoder: Crosscoder, acts: torch.Tensor, D: torch.Tensor) -> dict[str, torch.Tensor]:
    scaling = LatentScaling(crosscoder, D)
    for batch in acts.split(16):
        f = crosscoder.encode(batch)
        scaling.update(batch, f, crosscoder.decode(f))
    return {name: nu.value for name, nu in scaling.estimates().items()}


def test_it_is_the_ratio_of_two_regressions_of_one_coefficient() -> None:
    acts = make_acts(80, D_A + D_B)
    crosscoder = train_steps(make_batchtopk(), acts).to_inference().requires_grad_(False)
    D = directions(crosscoder, a_map())
    found = scaled(crosscoder, acts, D)
    f = crosscoder.encode(acts)
    rebuilt = crosscoder.decode(f)
    is_a = owned_by_a(crosscoder)
    fired = (f > 0).any(dim=0).nonzero()[:, 0]
    assert len(fired) > 5
    for j in fired.tolist():
        for name in ("error", "reconstruction"):
            betas = {}
            for m, inputs in crosscoder.partition.models.items():
                y = (rebuilt - crosscoder.b_dec)[:, inputs]
                if name == "error":
                    own = f[:, j, None] * crosscoder.W_dec[j, inputs]
                    y = acts[:, inputs] - (rebuilt[:, inputs] - own)
                # Each dimension with an intercept of its own.
                x, y = (z - z.mean(dim=0) for z in (f[:, j, None] * D[j, inputs], y))
                x, y = x.flatten().double()[:, None], y.flatten().double()[:, None]
                betas[m] = torch.linalg.lstsq(x, y).solution.item()
            nu = betas["b"] / betas["a"] if is_a[j] else betas["a"] / betas["b"]
            assert found[f"nu_{name}"][j].item() == pytest.approx(nu, rel=1e-3, abs=1e-5)


def crosscoder_of(W_enc: list[list[float]], W_dec: list[list[float]]) -> Crosscoder:
    """Latents of models of width 1, all shared."""
    from sae_lens_dfc.crosscoders.inference import CrosscoderConfig

    crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=len(W_dec), d_a=1, d_b=1))
    crosscoder.W_enc.data, crosscoder.W_dec.data = torch.tensor(W_enc), torch.tensor(W_dec)
    return crosscoder


ACTS_A = torch.tensor([[1.0], [2.0], [0.5]])


def test_a_feature_that_b_lacks_has_neither() -> None:
    crosscoder = crosscoder_of([[1.0], [0.0]], [[1.0, 0.0]])
    found = scaled(crosscoder, torch.cat([ACTS_A, 0 * ACTS_A], 1), torch.ones(1, 2))
    assert found["nu_error"].tolist() == [0.0] and found["nu_reconstruction"].tolist() == [0.0]


def test_a_feature_left_out_of_bs_decoder_is_in_its_error() -> None:
    crosscoder = crosscoder_of([[1.0], [0.0]], [[1.0, 0.0]])
    found = scaled(crosscoder, torch.cat([ACTS_A, ACTS_A], 1), torch.ones(1, 2))
    assert found["nu_error"].tolist() == [1.0] and found["nu_reconstruction"].tolist() == [0.0]


def test_a_feature_that_another_latent_rebuilds_in_b_is_in_its_reconstruction() -> None:
    crosscoder = crosscoder_of([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    found = scaled(crosscoder, torch.cat([ACTS_A, ACTS_A], 1), torch.ones(2, 2))
    assert found["nu_error"].tolist() == [0.0, 0.0]
    assert found["nu_reconstruction"].tolist() == [1.0, 1.0]


def test_a_constant_is_no_latents_doing() -> None:
    crosscoder = crosscoder_of([[1.0], [0.0]], [[1.0, 0.0]])
    found = scaled(crosscoder, torch.cat([ACTS_A, 100 + 0 * ACTS_A], 1), torch.ones(1, 2))
    assert found["nu_error"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_latent_that_never_fires_has_no_scaling() -> None:
    crosscoder = crosscoder_of([[-1.0], [0.0]], [[1.0, 0.0]])
    found = scaled(crosscoder, torch.cat([ACTS_A, ACTS_A], 1), torch.ones(1, 2))
    assert found["nu_error"].isnan().all()


@torch.no_grad()
def test_a_direction_is_the_sources_own_and_moves_to_the_target_at_its_length() -> None:
    crosscoder, affine_maps = make_firing_dfc(), a_map()
    crosscoder.input_scale.copy_(torch.tensor([2.0, 0.5]))
    D, partition = directions(crosscoder, affine_maps), crosscoder.partition
    a, b = partition.models["a"], partition.models["b"]
    for group, source, target, matrix, scales in (
        ("a_exclusive", a, b, affine_maps.a_to_b, (2.0, 0.5)),
        ("b_exclusive", b, a, affine_maps.b_to_a, (0.5, 2.0)),
    ):
        j = partition.slices[group].start
        own = crosscoder.W_dec[j, source]
        assert torch.equal(D[j, source], own)
        moved = own @ matrix
        torch.testing.assert_close(normalize(D[j, target], dim=0), normalize(moved, dim=0))
        assert scales[1] * D[j, target].norm().item() == pytest.approx(
            scales[0] * own.norm().item()
        )


def test_without_a_map_the_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="width 5 cannot be used as one of width 7"):
        directions(make_firing_dfc(), None)


@torch.no_grad()
def test_without_a_map_a_direction_is_the_same_in_the_units_of_training() -> None:
    crosscoder = make_firing_dfc(d_b=5)
    crosscoder.input_scale.copy_(torch.tensor([2.0, 0.5]))
    D = directions(crosscoder, None)
    torch.testing.assert_close(2.0 * D[0, :5], 0.5 * D[0, 5:])


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        LatentScaling(make_firing_dfc(), torch.ones(24, 12)).estimates()
