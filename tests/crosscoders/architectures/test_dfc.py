from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from torch import Tensor

from sae_lens_dfc import DFCTrainingCrosscoder, DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.dfc import exclusivity_tests
from tests.helpers import dfc_config, make_acts, make_dfc, step_input, train_steps


def test_partition_sizes_are_floors_of_the_fractions() -> None:
    cfg = dfc_config(d_sae=131_072, a_exclusive_fraction=0.05, b_exclusive_fraction=0.03)
    assert (cfg.n_a_exclusive, cfg.n_b_exclusive) == (6_553, 3_932)


def test_budgets_share_k_in_proportion_to_latents() -> None:
    budgets = {s.start: share for s, share in make_dfc(selection="partition").topk_groups()}
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
    # Why a plain DFC starves. A shared latent sums two models' inputs: twice the variance. Its norm
    # counts for two in sum (four in square), for the root of two in L2 (two in square).
    cfg = dfc_config(d_a=64, d_b=64, d_sae=400, b_exclusive_fraction=0.25, decoder_norm=norm)
    crosscoder = DFCTrainingCrosscoder(cfg)
    crosscoder.input_scale += 1
    _, scores = crosscoder.encode_with_hidden_pre(torch.randn(4_000, 128))
    power = {n: scores[:, s].var().item() for n, s in crosscoder.partition.slices.items()}
    assert power["a_exclusive"] / power["shared"] == pytest.approx(share, rel=0.06)


# --- tests of exclusivity ---

N_FEATURES = 5
WORTH_IN_B = [1.0, 1.0, 0.5, 2.0, 1.0]
"""How strong a feature is in B where it is 1 in A."""


def planted(n: int) -> Tensor:
    """Feature 0 is A's, feature 1 is B's, 2 to 4 are both models'; one dimension each in either
    model.

    Feature 0 fires only where the shared feature 4 does: in A alone all the same.
    """
    strengths = torch.rand(n, N_FEATURES) * (torch.rand(n, N_FEATURES) < 0.3)
    strengths[:, 0] = (torch.rand(n) < 0.5) * strengths[:, 4]
    a, b = strengths.clone(), strengths * torch.tensor(WORTH_IN_B)
    a[:, 1], b[:, 0] = 0, 0
    return torch.cat([a, b], dim=1)


def planted_dfc(latents: list[tuple[int, str]], n_a: int, n_b: int) -> DFCTrainingCrosscoder:
    """A DFC whose latent i rebuilds one feature, in A ("a"), B ("b") or both ("ab"), by decoders of
    many sizes."""
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
        reassign_steps=[4],
        evidence_window=4,
    )
    crosscoder = DFCTrainingCrosscoder(cfg)
    crosscoder.fit_normalization(planted(1000))
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.zero_()
        for i, (feature, models) in enumerate(latents):
            size = 2.0 if i % 2 == 0 else 0.5
            for model in models:
                d = "ab".index(model) * N_FEATURES + feature
                worth = 1.0 if model == "a" else WORTH_IN_B[feature]
                crosscoder.W_dec[i, d] = worth * size
                crosscoder.W_enc[d, i] = 1 / (len(models) * worth * size)
    return crosscoder


def after_the_test(crosscoder: DFCTrainingCrosscoder, n: int = 2000) -> DFCTrainingCrosscoder:
    for step in range(5):
        crosscoder.training_forward_pass(step_input(planted(n), step=step))
    return crosscoder


SPLIT = [(0, "a"), (2, "a"), (3, "a"), (1, "b"), (2, "b"), (4, "ab"), (0, "")]
"""A has three latents and B two: feature 2 is split between them, of feature 3 A has its half
alone. The last is empty."""


def split_dfc() -> DFCTrainingCrosscoder:
    return planted_dfc(SPLIT, n_a=3, n_b=2)


def test_a_shared_feature_in_an_exclusive_latent_is_found_out_and_a_true_one_stays() -> None:
    crosscoder = after_the_test(split_dfc())
    assert crosscoder.partition.sizes == {"a_exclusive": 1, "b_exclusive": 1, "shared": 5}
    saved = crosscoder.to_inference()
    written = [row.nonzero()[:, 0].tolist() for row in saved.W_dec.abs() > 0.1]
    assert written[:2] == [[0], [N_FEATURES + 1]]
    both = [[f, N_FEATURES + f] for f in range(N_FEATURES)]
    assert sorted(written[2:]) == [[], both[2], both[2], both[3], both[4]]


def test_a_latent_that_becomes_shared_is_worth_in_the_other_model_what_the_feature_is() -> None:
    saved = after_the_test(split_dfc()).to_inference()
    for row in saved.W_dec[2:][saved.W_dec[2:].any(dim=1)]:
        feature = int(row[:N_FEATURES].argmax())
        ratio = (row[N_FEATURES + feature] / row[feature]).item()
        assert ratio == pytest.approx(WORTH_IN_B[feature], abs=0.05)


def test_a_latent_that_becomes_shared_keeps_its_activations() -> None:
    # Feature 3 is twice as strong in B: an encoder that merely halved would give 1.5 times the
    # activation.
    crosscoder = planted_dfc([(0, "a"), (3, "a"), (1, "b"), (4, "ab"), (2, "ab")], n_a=2, n_b=1)
    acts = planted(200)
    crosscoder.training_forward_pass(step_input(planted(500)))
    before = crosscoder.training_forward_pass(step_input(acts)).sae_out
    after_the_test(crosscoder)
    assert crosscoder.partition.n_a_exclusive == 1
    after = crosscoder.training_forward_pass(step_input(acts, step=9)).sae_out
    torch.testing.assert_close(after[:, :N_FEATURES], before[:, :N_FEATURES], atol=0.02, rtol=0)
    b = slice(N_FEATURES, None)
    torch.testing.assert_close(after[:, b], acts[:, b], atol=0.05, rtol=0)


def test_a_shared_latent_of_one_model_becomes_exclusive_and_nothing_rebuilt_changes() -> None:
    latents = [(3, "ab"), (0, "a"), (1, "b"), (2, "ab"), (4, "ab")]
    crosscoder, acts = planted_dfc(latents, n_a=0, n_b=0), planted(200)
    with torch.no_grad():
        crosscoder.b_enc.copy_(torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]))
    before = crosscoder.training_forward_pass(step_input(acts)).sae_out
    after_the_test(crosscoder)
    assert crosscoder.partition.sizes == {"a_exclusive": 1, "b_exclusive": 1, "shared": 3}
    after = crosscoder.training_forward_pass(step_input(acts, step=9)).sae_out
    torch.testing.assert_close(after, before)
    saved = crosscoder.to_inference()
    assert (saved.cfg.n_a_exclusive, saved.cfg.n_b_exclusive, saved.max_forbidden_weight()) == (
        1,
        1,
        0,
    )


@pytest.mark.parametrize(("worth_in_b", "n_a"), [(0.2, 1), (0.3, 0)])
def test_a_shared_latent_is_moved_by_its_relative_norm(worth_in_b: float, n_a: int) -> None:
    # 1 / 1.2 is above 0.8, 1 / 1.3 is not.
    crosscoder = planted_dfc([(2, "ab"), (0, "ab")], n_a=0, n_b=0)
    with torch.no_grad():
        crosscoder.W_dec[1, 0], crosscoder.W_dec[1, N_FEATURES] = 1, worth_in_b
    assert after_the_test(crosscoder).partition.n_a_exclusive == n_a


def test_latents_that_lie_right_keep_their_place() -> None:
    crosscoder = split_dfc()
    W_dec = crosscoder.W_dec.detach().clone()
    after_the_test(crosscoder)
    assert torch.equal(crosscoder.W_dec[0], W_dec[0])  # A's true one
    assert torch.equal(crosscoder.W_dec[5:], W_dec[5:])  # the shared ones


def test_evidence_is_of_the_window_before_the_test_alone() -> None:
    crosscoder = split_dfc()
    crosscoder.cfg = replace(crosscoder.cfg, reassign_steps=[10])
    for step in range(11):
        # Before the window B is silent, as if everything were A's own.
        acts = planted(500)
        if step < 6:
            acts[:, N_FEATURES:] = 0
        crosscoder.training_forward_pass(step_input(acts, step=step))
    assert crosscoder.partition.sizes == {"a_exclusive": 1, "b_exclusive": 1, "shared": 5}


def test_a_latent_that_fired_too_seldom_is_not_judged() -> None:
    crosscoder = split_dfc()
    with torch.no_grad():
        crosscoder.b_enc[
            1
        ] = -1.97  # of feature 2 in A, whose encoder is 2, only activations above 0.985
    assert after_the_test(crosscoder, n=500).partition.n_a_exclusive == 2


def test_half_the_evidence_is_no_test_and_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    crosscoder = split_dfc()
    for step in range(2, 5):  # resumed at step 2
        crosscoder.training_forward_pass(step_input(planted(500), step=step))
    assert crosscoder.partition == crosscoder.cfg.partition
    assert "Step 4: exclusive latents are not tested" in caplog.text


def test_without_test_steps_the_partitions_stay() -> None:
    crosscoder = train_steps(make_dfc(), make_acts(32, 12), n=10)
    assert crosscoder.partition == crosscoder.cfg.partition


def test_a_checkpoint_restores_sizes_that_a_test_changed(tmp_path: Path) -> None:
    crosscoder = after_the_test(split_dfc()).eval()
    crosscoder.save_model(tmp_path)
    restored = TrainingSAE.load_from_disk(tmp_path).eval()
    assert isinstance(restored, DFCTrainingCrosscoder)
    assert restored.partition == crosscoder.partition != crosscoder.cfg.partition
    acts = planted(50)
    assert torch.equal(restored.encode(acts), crosscoder.encode(acts))


def test_tests_after_shares_outside_the_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fractions of the training in \(0, 1\), got \[1.0\]"):
        exclusivity_tests([0.5, 1.0], 100)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reassign_steps": [30]}, "needs evidence_window=50 steps"),
        ({"reassign_steps": [100, 120]}, r"got reassign_steps=\[100, 120\]"),
        ({"reassign_steps": [100], "evidence_window": 1}, r"\(at least 2\)"),
        ({"reassign_steps": [100], "selection": "partition"}, "Set selection='pooled'"),
        ({"min_own_share": 0.5}, r"min_own_share must be above 0.5 and below 1, got 0.5"),
    ],
)
def test_tests_that_cannot_be_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dfc(**overrides)
