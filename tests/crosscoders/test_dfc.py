from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from torch import Tensor

from sae_lens_dfc import DFCTrainingCrosscoder, DFCTrainingCrosscoderConfig
from tests.helpers import dfc_config, make_acts, make_dfc, step_input, train_steps


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


# --- tests of exclusivity ---

N_FEATURES = 4


def planted(n: int) -> Tensor:
    """Feature 0 is A's, feature 1 is B's, 2 and 3 are both models'; one dimension each in either model."""
    acts = torch.zeros(n, 2 * N_FEATURES)
    for feature, models in enumerate([(0,), (1,), (0, 1), (0, 1)]):
        strength = torch.rand(n) * (torch.rand(n) < 0.3)
        for model in models:
            acts[:, model * N_FEATURES + feature] = strength
    return acts


def planted_dfc(latents: list[tuple[int, str]], n_a: int, n_b: int) -> DFCTrainingCrosscoder:
    """A DFC whose latent i reads and writes one feature, in A ("a"), B ("b") or both ("ab")."""
    d_sae = len(latents)
    cfg = DFCTrainingCrosscoderConfig(
        d_a=N_FEATURES,
        d_b=N_FEATURES,
        d_sae=d_sae,
        k=d_sae,
        a_exclusive_fraction=n_a / d_sae,
        b_exclusive_fraction=n_b / d_sae,
        normalization="none",
        aux_loss_coefficient=0.0,
        test_steps=[4],
        test_window=4,
    )
    crosscoder = DFCTrainingCrosscoder(cfg)
    crosscoder.fit_normalization(planted(1000))
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.zero_()
        for i, (feature, models) in enumerate(latents):
            for model in models:
                d = "ab".index(model) * N_FEATURES + feature
                crosscoder.W_enc[d, i] = 1 / len(models)
                crosscoder.W_dec[i, d] = 1
    return crosscoder


def after_the_test(crosscoder: DFCTrainingCrosscoder) -> DFCTrainingCrosscoder:
    for step in range(5):
        crosscoder.training_forward_pass(step_input(planted(500), step=step))
    return crosscoder


def test_a_shared_feature_split_in_two_is_found_out_and_a_true_one_stays() -> None:
    latents = [(0, "a"), (2, "a"), (1, "b"), (2, "b"), (3, "ab")]
    crosscoder = after_the_test(planted_dfc(latents, n_a=2, n_b=2))
    sizes = crosscoder.partition.sizes
    assert sizes == {"a_exclusive": 1, "b_exclusive": 1, "shared": 3}
    written = crosscoder.to_inference().W_dec > 0.1
    assert [row.nonzero()[:, 0].tolist() for row in written] == [
        [0],  # A's feature
        [N_FEATURES + 1],  # B's
        [2, N_FEATURES + 2],  # both halves of the split one write both models now
        [2, N_FEATURES + 2],
        [3, N_FEATURES + 3],
    ]


def test_a_shared_latent_of_one_model_becomes_exclusive() -> None:
    latents = [(3, "ab"), (0, "a"), (1, "b"), (2, "ab")]
    crosscoder = after_the_test(planted_dfc(latents, n_a=0, n_b=0))
    assert crosscoder.partition.sizes == {"a_exclusive": 1, "b_exclusive": 1, "shared": 2}
    saved = crosscoder.to_inference()
    assert (saved.cfg.n_a_exclusive, saved.cfg.n_b_exclusive) == (1, 1)
    assert saved.W_dec[0].argmax() == 0 and saved.W_dec[1].argmax() == N_FEATURES + 1
    assert saved.leak() == 0


def test_moving_true_latents_changes_nothing_that_is_rebuilt() -> None:
    latents = [(3, "ab"), (0, "a"), (1, "b"), (2, "ab")]
    crosscoder, acts = planted_dfc(latents, n_a=0, n_b=0), planted(200)
    before = crosscoder.training_forward_pass(step_input(acts)).sae_out
    after_the_test(crosscoder)
    assert crosscoder.partition.n_a_exclusive == 1
    after = crosscoder.training_forward_pass(step_input(acts, step=9)).sae_out
    torch.testing.assert_close(after, before)


def test_a_latent_that_did_not_fire_is_not_judged() -> None:
    latents = [(0, "a"), (2, "a"), (1, "b"), (2, "b"), (3, "ab")]
    crosscoder = planted_dfc(latents, n_a=2, n_b=2)
    with torch.no_grad():
        crosscoder.W_enc[:, 1] = 0
    assert after_the_test(crosscoder).partition.n_a_exclusive == 2


def test_half_the_evidence_is_no_test_and_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    latents = [(0, "a"), (2, "a"), (1, "b"), (2, "b"), (3, "ab")]
    crosscoder = planted_dfc(latents, n_a=2, n_b=2)
    for step in range(2, 5):  # resumed at step 2
        crosscoder.training_forward_pass(step_input(planted(500), step=step))
    assert crosscoder.partition == crosscoder.cfg.partition
    assert "Step 4: exclusive latents are not tested" in caplog.text


def test_without_test_steps_the_partitions_stay() -> None:
    crosscoder = train_steps(make_dfc(), make_acts(32, 12), n=10)
    assert crosscoder.partition == crosscoder.cfg.partition


def test_a_checkpoint_restores_sizes_that_a_test_changed(tmp_path: Path) -> None:
    latents = [(0, "a"), (2, "a"), (1, "b"), (2, "b"), (3, "ab")]
    crosscoder = after_the_test(planted_dfc(latents, n_a=2, n_b=2)).eval()
    crosscoder.save_model(tmp_path)
    restored = TrainingSAE.load_from_disk(tmp_path).eval()
    assert isinstance(restored, DFCTrainingCrosscoder)
    assert restored.partition == crosscoder.partition != crosscoder.cfg.partition
    acts = planted(50)
    assert torch.equal(restored.encode(acts), crosscoder.encode(acts))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"test_steps": [30]}, "needs test_window=50 steps"),
        ({"test_steps": [100, 120]}, r"got test_steps=\[100, 120\]"),
        ({"test_steps": [100], "test_window": 1}, r"\(at least 2\)"),
        ({"test_steps": [100], "selection": "partition"}, "Set selection='pooled'"),
        ({"min_own_share": 0.5}, r"min_own_share must be in \(0.5, 1\), got 0.5"),
    ],
)
def test_tests_that_cannot_be_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dfc(**overrides)
