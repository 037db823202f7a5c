"""The share of firings after which the other model predicts worse, counted by hand."""

import math

import pytest
import torch

from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.metrics.exclusivity.evidence import p_above
from sae_lens_dfc.metrics.exclusivity.target_worse import TargetWorse


def crosscoder() -> Crosscoder:
    """Latent 0 is A's, latent 1 is B's."""
    cfg = CrosscoderConfig(d_in=2, d_sae=2, d_a=1, d_b=1, n_a_exclusive=1, n_b_exclusive=1)
    made = Crosscoder(cfg)
    made.W_dec.data = torch.eye(2)
    return made


def twice(losses: torch.Tensor) -> torch.Tensor:
    """The same losses up to the next pair and up to the eighth."""
    return torch.stack([losses, losses], dim=1)


def test_each_models_latents_count_the_other_models_losses() -> None:
    measure = TargetWorse(crosscoder())
    feature_acts = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 0.5], [0.0, 9.0]])
    # A's loss, B's loss: B is worse, B is worse, A is worse, neither by a quarter, A is worse.
    following = torch.tensor([[1.0, 2.0], [1.0, 1.3], [2.0, 1.0], [1.0, 1.2], [4.0, 1.0]])
    measure.update(feature_acts, twice(following))
    assert measure.estimates()["target_worse"].value.tolist() == pytest.approx([2 / 4, 2 / 4])


def test_rows_without_a_loss_do_not_count() -> None:
    measure = TargetWorse(crosscoder())
    following = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [math.nan, math.nan]])
    measure.update(torch.ones(3, 2), twice(following))
    measure.update(torch.ones(1, 2), twice(following[2:]))
    found = measure.estimates()["target_worse"]
    assert found.value.tolist() == [1.0, 0.0]
    assert found.degrees == 0


def test_a_latent_that_does_not_fire_has_no_share() -> None:
    measure = TargetWorse(crosscoder())
    measure.update(torch.tensor([[1.0, 0.0]]), twice(torch.tensor([[1.0, 2.0]])))
    assert measure.estimates()["target_worse"].value.isnan().tolist() == [False, True]


def test_the_standard_error_is_that_of_a_share() -> None:
    """Of independent firings: the binomial's."""
    measure = TargetWorse(crosscoder())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        worse = torch.rand(200, generator=generator) < 0.3
        following = torch.stack([torch.ones(200), 1 + worse.float()], dim=1)
        measure.update(torch.ones(200, 2), twice(following), torch.arange(200))
    found = measure.estimates()["target_worse"]
    assert found.value[0].item() == pytest.approx(0.3, abs=0.02)
    assert found.se[0].item() == pytest.approx(math.sqrt(0.3 * 0.7 / 10_000), rel=0.6)


def test_firings_that_are_all_alike_count_once_for_each_context() -> None:
    """The standard error is that of 17 of 19: 15 contexts that are worse, and two of each kind."""
    measure = TargetWorse(crosscoder())
    for batch in range(5):
        contexts = 3 * batch + torch.arange(3).repeat_interleave(10)
        measure.update(torch.ones(30, 2), twice(torch.tensor([[1.0, 2.0]] * 30)), contexts)
    found = measure.estimates()["target_worse"]
    assert found.value.tolist() == [1.0, 0.0]
    assert found.se.tolist() == pytest.approx([math.sqrt(17 * 2 / 19**3)] * 2)
    # Fifteen coins that all fall alike are no rarer than the p-value says.
    [p, _] = p_above(found._replace(degrees=9), 0.5).tolist()
    assert 0.5**15 / 2 < p < 10 * 0.5**15


def test_of_a_latent_that_fires_in_few_contexts_the_error_is_unknown() -> None:
    measure = TargetWorse(crosscoder())
    for _ in range(14):
        measure.update(torch.ones(50, 2), twice(torch.tensor([[1.0, 2.0]] * 50)))
    found = measure.estimates()["target_worse"]
    assert found.value.tolist() == [1.0, 0.0] and found.se.isnan().all()
    assert p_above(found, 0.5).tolist() == [1.0, 1.0]


def test_the_text_up_to_the_next_pair_and_that_up_to_the_eighth_are_counted_apart() -> None:
    measure = TargetWorse(crosscoder())
    next_pair, ahead = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 4.0]])
    measure.update(torch.ones(1, 2), torch.stack([next_pair, ahead], dim=1))
    found = measure.estimates()
    assert found["next_worse"].value.tolist() == [1.0, 0.0]
    assert found["target_worse"].value.tolist() == [0.0, 0.0]
