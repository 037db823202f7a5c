"""Shared latents ablated in both models: which are chosen, and the verdicts, by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_rel
from torch import Tensor

from sae_lens_dfc.analysis.causal.ablated_in_both import LossRises
from sae_lens_dfc.analysis.screening.shared_tests import SharedSizes, shared_choice
from sae_lens_dfc.analysis.screening.shared_verdicts import (
    SharedTest,
    compared,
    shared_findings,
)
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.models.config import ModelName

N = 12
LOSES = 0.5 + 0.05 * torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
UNMOVED = 0.05 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1])
QUIET = torch.stack([UNMOVED, -UNMOVED, 0 * UNMOVED])
"""Controls that change nothing on average."""
OTHERWISE = QUIET.roll(1, dims=1)
"""The same on other texts."""


def evidence(worse: Tensor, se: float = 0.01) -> LatentEvidence:
    """Of latents that B leads, none a candidate; how often A predicts worse is given."""
    n = len(worse)
    fields = dict.fromkeys(LatentEvidence._fields, torch.full((n,), torch.nan))
    none = torch.zeros(n, dtype=torch.bool)
    return LatentEvidence(
        **fields
        | {
            "is_a": none,
            "is_candidate": none,
            "firings": torch.full((n,), 100),
            "target_worse": worse,
            "target_worse_se": torch.full((n,), se),
            "next_worse": worse,
            "next_worse_se": torch.full((n,), se),
        }
    )


def of(
    own: Tensor, other: Tensor, own_controls: Tensor = QUIET, other_controls: Tensor = OTHERWISE
) -> SharedTest:
    """A latent that B leads."""
    rises: dict[ModelName, LossRises] = {
        "a": LossRises(other, other_controls),
        "b": LossRises(own, own_controls),
    }
    found = compared(rises, "b")
    assert found is not None
    return found


def verdicts(tests: Sequence[SharedTest | None], of: LatentEvidence) -> list[str]:
    found = shared_findings(dict(enumerate(tests)), of)
    assert [one.latent for one in found] == list(range(len(tests)))
    return [one.verdict for one in found]


def test_the_p_values_are_those_of_the_tests_that_the_docstring_names() -> None:
    other = LOSES.flip(0) - 0.4
    found = of(LOSES, other, 0.1 * LOSES[None], UNMOVED[None])
    paired = ttest_rel((LOSES - other).double(), (0.1 * LOSES - UNMOVED).double())
    assert found.p_different == pytest.approx(np.asarray(paired)[1] / 2, rel=1e-4)
    assert found.correlation == pytest.approx(np.asarray(spearmanr(LOSES, other))[0])
    assert found.source_rise.name == "ablated in B: B's loss rises by, nats"
    assert found.difference.name == "B's loss rises more than A's by, nats"
    assert found.difference.mean == pytest.approx(0.4)
    assert found.difference.controls == {
        "other shared latents": pytest.approx((0.1 * LOSES - UNMOVED).mean().item())
    }


def test_a_latent_by_which_its_own_model_loses_more_is_used_differently() -> None:
    tests = [of(LOSES, UNMOVED), of(LOSES, LOSES), of(UNMOVED, UNMOVED.flip(0))]
    assert verdicts(tests, evidence(torch.full((N,), 0.9))) == [
        "used differently",
        "used alike",
        "nothing shown",
    ]


def test_what_any_latent_would_do_there_is_no_evidence() -> None:
    """A model that predicts well can mostly only lose, and texts are hard for both."""
    often = evidence(torch.full((N,), 0.9))
    same = [of(LOSES, UNMOVED, own_controls=LOSES.expand(3, -1) + QUIET)]
    alike = [of(LOSES, LOSES, LOSES.expand(3, -1), LOSES.expand(3, -1))]
    assert verdicts(same, often) == verdicts(alike, often) == ["nothing shown"]


def test_the_other_model_must_also_predict_worse_where_it_fires() -> None:
    tests = [of(LOSES, UNMOVED)]
    for worse, se in ((0.5, 0.01), (0.6, 0.2), (torch.nan, 0.01), (0.9, torch.nan)):
        assert verdicts(tests, evidence(torch.tensor([worse]), se)) == ["nothing shown"]
    [found] = shared_findings(dict(enumerate(tests)), evidence(torch.tensor([torch.nan])))
    assert "was not measured" in found.reasons[0] and not any("nan" in x for x in found.reasons)


def test_the_more_are_tested_the_clearer_one_must_be() -> None:
    doubtful = replace(of(LOSES, UNMOVED), p_different=0.04, p_alike=1.0)
    poor = replace(doubtful, p_different=0.9)
    often = evidence(torch.full((N,), 0.9))
    assert verdicts([doubtful], often) == ["used differently"]
    assert verdicts([doubtful, poor, poor], often)[0] == "nothing shown"


def test_too_few_texts_are_no_test() -> None:
    few = LossRises(LOSES[:9], QUIET[:, :9])
    assert compared({"a": few, "b": few}, "a") is None
    [found] = shared_findings({0: None}, evidence(torch.tensor([0.9])))
    assert found.verdict == "not tested" and found.effects == []


def test_those_are_chosen_after_which_the_target_surely_predicts_worse() -> None:
    worse = torch.tensor([0.8, 0.2, 0.9, 0.1, torch.nan, 0.3, 0.85, 0.4, 0.45])
    every = evidence(worse)
    choice = shared_choice(every, 2, SharedSizes(controls=3))
    assert choice.chosen == [2, 6] and choice.others == [0, 8]
    assert len(choice.controls) == 3
    # Those first after which the very next text shows it best.
    next_worse = torch.where(worse == 0.8, 0.7, 0.6)
    in_order = shared_choice(every._replace(next_worse=next_worse), 3, SharedSizes())
    assert in_order.chosen == [0, 2, 6]
    assert not set(choice.controls) & {*choice.chosen, *choice.others}
    # One in a hundred is this far above a half by chance.
    doubtful = evidence(torch.cat([torch.tensor([0.528]), torch.full((99,), 0.3)]))
    assert shared_choice(doubtful, 4, SharedSizes()).chosen == []
    assert shared_choice(evidence(doubtful.target_worse[:1]), 4, SharedSizes()).chosen == [0]


def test_candidates_and_rare_latents_are_not_chosen() -> None:
    every = evidence(torch.full((5,), 0.9))
    rare = every._replace(firings=torch.tensor([100, 100, 5, 100, 100]))
    candidate = rare._replace(is_candidate=torch.arange(5) == 0)
    choice = shared_choice(candidate, 9, SharedSizes())
    assert choice.chosen == [1, 3, 4] and choice.others == choice.controls == []
    assert shared_choice(candidate, 0, SharedSizes()).chosen == []
