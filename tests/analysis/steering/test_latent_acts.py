import pytest
import torch

from sae_lens_dfc.analysis.steering.latent_acts import (
    acts_of_one,
    explained_by,
    latent_acts,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.stats.affine_maps import AffineMaps
from tests.helpers import make_acts, make_firing_dfc


@pytest.fixture
def crosscoder() -> Crosscoder:
    torch.manual_seed(0)
    crosscoder = make_firing_dfc()
    crosscoder.threshold.data.uniform_(0, 2)
    return crosscoder


def test_some_latents_are_those_of_all(crosscoder: Crosscoder) -> None:
    acts = make_acts(50, 12).view(5, 10, 12)
    latents = [17, 0, 9]
    found = latent_acts(crosscoder, acts, latents)
    torch.testing.assert_close(found, crosscoder.encode(acts)[..., latents])
    assert 0 < (found > 0).float().mean() < 1


def test_a_vector_or_a_map_stands_in_for_the_other_model() -> None:
    x, mean = torch.tensor([[[2.0, 1.0]]]), torch.tensor([5.0, 6.0, 7.0])
    assert acts_of_one("a", x, mean).tolist() == [[[2.0, 1.0, 5.0, 6.0, 7.0]]]
    swap = AffineMaps(
        torch.zeros(2), torch.ones(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2 * torch.eye(2)
    )
    assert acts_of_one("a", x, swap).tolist() == [[[2.0, 1.0, 2.0, 3.0]]]
    assert acts_of_one("b", x, swap).tolist() == [[[2.0, 0.0, 2.0, 1.0]]]


def test_a_latent_of_one_model_does_not_depend_on_what_stands_in_for_the_other(
    crosscoder: Crosscoder,
) -> None:
    acts = make_acts(50, 12)
    own = list(range(6))  # A's
    for other in (torch.zeros(7), torch.full((7,), 1e3)):
        found = latent_acts(crosscoder, acts_of_one("a", acts[:, :5], other), own)
        torch.testing.assert_close(found, crosscoder.encode(acts)[:, own])
    shared = latent_acts(crosscoder, acts_of_one("a", acts[:, :5], torch.zeros(7)), [20])
    assert not torch.allclose(shared, crosscoder.encode(acts)[:, [20]])


def test_a_map_that_is_exact_explains_all_and_a_constant_does_not(crosscoder: Crosscoder) -> None:
    to_b, acts_a = torch.randn(5, 7), make_acts(400, 5)
    acts = torch.cat([acts_a, acts_a @ to_b], dim=1)
    exact = AffineMaps(torch.zeros(5), torch.zeros(7), to_b, torch.zeros(7, 5))
    batches = list(acts.split(150))
    latents = [2, 12, 20]
    assert explained_by(crosscoder, "a", latents, exact, batches).tolist() == pytest.approx(
        [1, 1, 1], abs=1e-4
    )
    mean = acts[:, 5:].mean(dim=0)
    found = explained_by(crosscoder, "a", latents, mean, batches)
    f, guess = (
        crosscoder.encode(x)[:, latents].double()
        for x in (acts, torch.cat([acts_a, mean.expand(400, -1)], dim=1))
    )
    by_hand = 1 - (f - guess).pow(2).sum(dim=0) / (f - f.mean(dim=0)).pow(2).sum(dim=0)
    torch.testing.assert_close(found, by_hand.float(), rtol=1e-4, atol=1e-4)
    assert found[0] == pytest.approx(1, abs=1e-4) and found[2] < 0.999


def test_how_much_is_explained_of_a_silent_latent_is_not_known(crosscoder: Crosscoder) -> None:
    crosscoder.threshold.data[20] = 1e9
    found = explained_by(crosscoder, "a", [20], torch.zeros(7), [make_acts(9, 12)])
    assert found.isnan().all()
