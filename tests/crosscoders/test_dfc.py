from typing import Any

import pytest
import torch

from sae_lens_dfc import DFCTrainingCrosscoder
from tests.helpers import dfc_config, make_acts, make_dfc, step_input


def test_partition_sizes_are_floors_of_the_fractions() -> None:
    cfg = dfc_config(d_sae=131_072, a_exclusive_fraction=0.05, b_exclusive_fraction=0.03)
    assert (cfg.n_a_exclusive, cfg.n_b_exclusive) == (6_553, 3_932)


def test_budgets_share_k_in_proportion_to_latents() -> None:
    budgets = {s.start: share for s, share in make_dfc(selection="partition").budgets()}
    assert budgets == {0: 6 / 24, 6: 4 / 24, 10: 14 / 24}


def test_each_partition_keeps_exactly_its_budget_of_the_batch() -> None:
    crosscoder = make_dfc(k=4, selection="partition")
    acts = crosscoder.training_forward_pass(step_input(make_acts(60, 12))).feature_acts
    active = {name: int((acts[:, s] > 0).sum()) for name, s in crosscoder.partition.slices.items()}
    assert active == {"a_exclusive": 60, "b_exclusive": 40, "shared": 140}


def test_pooled_selection_is_the_largest_scores_of_the_whole_batch() -> None:
    crosscoder, acts = make_dfc(selection="pooled", k=3), make_acts(40, 12)
    crosscoder.fit_normalization(acts)
    feature_acts, scores = crosscoder.encode_with_hidden_pre(acts)
    kept = feature_acts[feature_acts > 0].sort().values
    torch.testing.assert_close(kept, scores.flatten().topk(3 * 40).values.sort().values)


@pytest.mark.parametrize(("norm", "share"), [("sum", 1 / 8), ("l2", 1 / 4)])
def test_a_fresh_exclusive_latents_score_is_a_fixed_share_of_a_shared_ones(
    norm: Any, share: float
) -> None:
    # Why a plain DFC starves. A shared latent sums two models' inputs: twice the variance. Its norm counts for two in
    # sum (four in square), for the root of two in L2 (two in square).
    cfg = dfc_config(d_a=64, d_b=64, d_sae=400, b_exclusive_fraction=0.25, decoder_norm=norm)
    crosscoder = DFCTrainingCrosscoder(cfg)
    crosscoder.input_scale += 1
    _, scores = crosscoder.encode_with_hidden_pre(torch.randn(4_000, 128))
    power = {n: scores[:, s].var().item() for n, s in crosscoder.partition.slices.items()}
    assert power["a_exclusive"] / power["shared"] == pytest.approx(share, rel=0.06)
