"""Shared latents ablated in both models: which are chosen, and the verdicts, by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_1samp, ttest_rel
from torch import Tensor

from sae_lens_dfc.analysis.causal.ablated_in_both import LossRises
from sae_lens_dfc.analysis.screening.shared_tests import shared_latents
from sae_lens_dfc.analysis.screening.shared_verdicts import (
    SharedTest,
    compared,
    shared_findings,
)
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence

LOSES = torch.tensor([0.5, 0.7, 0.4, 0.6, 0.8, 0.3])
UNMOVED = torch.tensor([0.1, -0.1, 0.0, 0.1, -0.1, 0.0])


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
        }
    )


def of(own: Tensor, other: Tensor) -> SharedTest:
    found = compared(LossRises(other, own), "b")
    assert found is not None
    return found


def verdicts(results: dict[int, SharedTest | None], of: LatentEvidence) -> list[str]:
    found = shared_findings(results, ["shared"] * len(results), of)
    assert [one.latent for one in found] == list(results)
    return [one.verdict for one in found]


def test_the_p_values_are_those_of_the_tests_that_the_docstring_names() -> None:
    other = torch.tensor([0.3, 0.2, 0.4, 0.1, 0.5, 0.2])
    found = of(LOSES, other)
    own_p = np.asarray(ttest_1samp(LOSES.double(), 0, alternative="greater"))[1]
    more_p = np.asarray(ttest_rel(LOSES.double(), other.double(), alternative="greater"))[1]
    assert found.p_more == pytest.approx(max(own_p, more_p), rel=1e-5)
    alike = np.asarray(spearmanr(LOSES, other, alternative="greater"))
    assert (found.correlation, found.p_alike) == pytest.approx(tuple(alike))
    assert found.source_rise.name.startswith("ablated in B")
    assert found.source_rise.mean == pytest.approx(LOSES.mean().item())
    assert found.target_rise.mean == pytest.approx(other.mean().item())


def test_too_few_texts_are_no_test() -> None:
    assert compared(LossRises(LOSES[:2], LOSES[:2]), "a") is None
    [found] = shared_findings({0: None}, ["shared"], evidence(torch.tensor([0.9])))
    assert found.verdict == "shared" and "fewer than 3" in found.reasons[0]


def test_a_latent_that_only_its_own_model_loses_by_is_used_differently() -> None:
    results: dict[int, SharedTest | None] = {
        0: of(LOSES, UNMOVED),
        1: of(LOSES, LOSES),  # both lose as much, on the same texts
        2: of(UNMOVED, UNMOVED.flip(0)),
        3: of(UNMOVED, -LOSES),  # the other gains, but its own model does not lose
    }
    assert verdicts(results, evidence(torch.full((4,), 0.9))) == [
        "used differently",
        "used alike",
        "shared",
        "shared",
    ]


def test_the_other_model_must_also_predict_worse_where_it_fires() -> None:
    results: dict[int, SharedTest | None] = {0: of(LOSES, UNMOVED)}
    assert verdicts(results, evidence(torch.tensor([0.5]))) == ["shared"]
    assert verdicts(results, evidence(torch.tensor([0.6]), se=0.2)) == ["shared"]
    assert verdicts(results, evidence(torch.tensor([torch.nan]))) == ["shared"]


def test_the_more_are_tested_the_clearer_one_must_be() -> None:
    doubtful = replace(of(LOSES, UNMOVED), p_more=0.04, p_alike=1.0)
    poor = replace(doubtful, p_more=0.9)
    alone = verdicts({0: doubtful}, evidence(torch.tensor([0.9])))
    among = verdicts({0: doubtful, 1: poor, 2: poor}, evidence(torch.full((3,), 0.9)))
    assert (alone[0], among[0]) == ("used differently", "shared")


def test_those_come_first_after_which_the_target_predicts_worse() -> None:
    worse = torch.tensor([0.6, 0.2, 0.9, 0.1, torch.nan, 0.3, 0.8, 0.4])
    of_all = evidence(worse)
    assert shared_latents(of_all, 2) == [2, 6, 0, 7]
    assert shared_latents(of_all, 4)[:3] == [2, 6, 0]
    assert shared_latents(of_all, 0) == []
    rare = of_all._replace(firings=torch.tensor([100, 100, 5, 100, 100, 100, 100, 100]))
    candidate = rare._replace(is_candidate=torch.arange(8) == 6)
    assert shared_latents(candidate, 1) == [0, 1]
