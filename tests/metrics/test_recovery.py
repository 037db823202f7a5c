"""Recovery on crosscoders whose latents are set by hand, so that every share can be counted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc import Crosscoder, CrosscoderConfig, Partition, ToyPair
from sae_lens_dfc.metrics.recovery import (
    Truth,
    called_exclusive,
    frequency_deciles,
    recovery,
    recovery_of_calls,
)
from tests.metrics.exclusivity.test_evidence import N_SPLIT, TOY, perfect
from tests.metrics.exclusivity.test_evidence import measured as evidence_of

# Two features of A, two of B, six shared; orthogonal, so that a cosine is 0 or 1.
FEATURES = Partition(d_a=8, d_b=8, n_a_exclusive=2, n_b_exclusive=2, n_shared=6)


def truth() -> Truth:
    directions = torch.zeros(10, 16)
    for i, shared in enumerate(range(4, 10)):
        directions[shared, i] = directions[shared, 8 + i] = 1
    directions[0, 6] = directions[1, 7] = 1
    directions[2, 14] = directions[3, 15] = 1
    return Truth(FEATURES, directions, torch.arange(10) / 10 + 0.01)


def crosscoder(W_dec: Tensor, n_a: int, n_b: int) -> Crosscoder:
    cfg = CrosscoderConfig(
        d_in=16, d_sae=len(W_dec), d_a=8, d_b=8, n_a_exclusive=n_a, n_b_exclusive=n_b
    )
    made = Crosscoder(cfg)
    with torch.no_grad():
        made.W_dec.copy_(W_dec)
    return made


def measured(W_dec: Tensor, n_a: int, n_b: int, **overrides: Any) -> dict[str, Any]:
    alive = overrides.pop("alive", torch.ones(len(W_dec), dtype=torch.bool))
    by = overrides.pop("by", "partition")
    return recovery(crosscoder(W_dec, n_a, n_b), truth(), alive, by)


def test_the_features_themselves_are_a_perfect_crosscoder() -> None:
    for by in ("partition", "relative_norm"):
        result = measured(truth().directions * 3, 2, 2, by=by)
        for name in ("exclusive_recall", "exclusive_learned", "exclusive_precision"):
            assert result[name] == 1
        assert (result["shared_recall"], result["exclusive_called"]) == (1, 4)
        assert result["false_exclusive_rate"] == result["leakage"] == 0


def test_half_a_shared_feature_in_an_exclusive_partition_is_false_and_leaks() -> None:
    W_dec = truth().directions.clone()
    W_dec[1] = 0
    W_dec[1, 0] = 1  # A's half of the first shared feature
    result = measured(W_dec, 2, 2)
    assert result["exclusive_recall"] == result["exclusive_precision"] == 0.75
    assert result["false_exclusive_rate"] == 0.25
    assert result["leakage"] == pytest.approx(1 / 6)
    assert result["shared_recall"] == 1


def test_of_two_latents_with_one_feature_one_is_false() -> None:
    W_dec = truth().directions.clone()
    W_dec[1] = W_dec[0]
    result = measured(W_dec, 2, 2)
    assert (result["exclusive_recall"], result["false_exclusive_rate"]) == (0.75, 0.25)


def test_an_exclusive_feature_in_a_shared_latent_is_learned_but_not_recalled() -> None:
    W_dec = truth().directions.clone()
    W_dec[[1, 9]] = W_dec[[9, 1]]  # A's second feature sits among the shared latents
    W_dec[9, 8:] = torch.eye(8)[3]  # and has something of B
    result = measured(W_dec, 2, 2)
    assert (result["exclusive_learned"], result["exclusive_recall"]) == (1, 0.75)


def test_a_shared_feature_needs_both_models_in_one_latent() -> None:
    W_dec = truth().directions.clone()
    W_dec[4, 8:] = torch.eye(8)[7]
    assert measured(W_dec, 2, 2)["shared_recall"] == pytest.approx(5 / 6)


def test_a_dead_latent_is_neither_found_nor_false() -> None:
    alive = torch.ones(10, dtype=torch.bool)
    alive[0] = False
    result = measured(truth().directions, 2, 2, alive=alive)
    assert result["exclusive_called"] == 3
    assert (result["exclusive_recall"], result["exclusive_precision"]) == (0.75, 1)


def test_without_a_call_there_is_no_rate() -> None:
    W_dec = torch.ones(10, 16)
    result = measured(W_dec, 0, 0, by="relative_norm")
    assert result["exclusive_called"] == 0
    assert result["exclusive_precision"] is result["false_exclusive_rate"] is None


def test_relative_norms_call_what_is_one_sided() -> None:
    W_dec = torch.zeros(4, 16)
    W_dec[:, 0] = torch.tensor(
        [0.9, 0.7, 0.3, 0.1]
    )  # shares of A: above 0.8 is A's, below 0.2 is B's
    W_dec[:, 8] = torch.tensor([0.1, 0.3, 0.7, 0.9])
    alive = torch.ones(4, dtype=torch.bool)
    called = called_exclusive(crosscoder(W_dec, 0, 0), alive, by="relative_norm")
    assert {name: latents.tolist() for name, latents in called.items()} == {
        "a_exclusive": [0],
        "b_exclusive": [3],
        "shared": [1, 2],
    }


def test_shares_by_frequency_are_of_the_features_in_each_decile() -> None:
    W_dec = truth().directions.clone()
    W_dec[4] = W_dec[5]  # the fifth feature by frequency is lost
    result = measured(W_dec, 2, 2)
    assert result["shared_recall/by_frequency"] == [None] * 4 + [0] + [1] * 5
    assert result["exclusive_recall/by_frequency"] == [1] * 4 + [None] * 6
    assert frequency_deciles(torch.rand(1000)).bincount().tolist() == [100] * 10


@pytest.mark.slow
def test_calls_with_evidence_are_counted_against_the_features() -> None:
    toy = ToyPair(TOY)
    made = perfect(toy, N_SPLIT)
    _, evidence = evidence_of(made, toy)
    features = Truth(toy.features, toy.directions, toy.frequencies)
    expected = {"evidence_recall": 1.0, "evidence_precision": 1.0, "evidence_called": 12}
    assert recovery_of_calls(made, features, evidence).items() >= expected.items()
    everything = evidence._replace(is_exclusive=evidence.is_candidate)
    found = recovery_of_calls(made, features, everything)
    assert found["evidence_precision"] == 12 / 20  # the halves of shared features are false
    nothing = evidence._replace(is_exclusive=evidence.is_candidate & False)
    assert recovery_of_calls(made, features, nothing)["evidence_precision"] is None
