"""Our trainer's step against SAELens' own, and what it must not depend on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_dfc.crosscoders.topk import TopKTrainingCrosscoder
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer
from tests.helpers import make_acts, make_delta, make_dfc, make_standard, sae_trainer_config

ROWS = 48
MAKERS = {
    "standard": make_standard,
    "dfc, dense": make_dfc,
    "dfc, sparse": partial(make_dfc, training_path="sparse"),
    "delta, sparse": partial(make_delta, training_path="sparse"),
}


def trained(kind: type[SAETrainer[Any, Any]], make: Callable[[], Any]) -> SAETrainer[Any, Any]:
    """Twenty steps, in which latents that are too weak to be kept come to be dead."""
    torch.manual_seed(0)
    crosscoder = make()
    with torch.no_grad():
        crosscoder.W_enc[:, ::5] /= 1000
        crosscoder.b_enc[::5] = -0.01
    trainer = kind(sae_trainer_config(ROWS, 20), crosscoder, iter(()))
    for _ in range(20):
        trainer.maybe_reset_sparsity()
        trainer.step(make_acts(ROWS, 12))
        trainer.n_training_steps += 1
    return trainer


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_training_and_its_counts_are_those_of_saelens_own_trainer(
    make: Callable[[], Any],
) -> None:
    theirs, ours = trained(SAETrainer, make), trained(CrosscoderSAETrainer, make)
    assert ours.optimizer.param_groups[0]["fused"] and not theirs.optimizer.param_groups[0]["fused"]
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(ours.sae.state_dict(), theirs.sae.state_dict())
    assert 0 < theirs.dead_neurons.sum() < 24
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
    assert ours.n_frac_active_samples == theirs.n_frac_active_samples
    assert ours.n_training_samples == theirs.n_training_samples


def test_latents_said_to_be_dead_from_outside_are_dead_in_the_next_step() -> None:
    make = partial(make_dfc, training_path="sparse")
    trainer = CrosscoderSAETrainer(
        sae_trainer_config(ROWS, dead_feature_window=1000), make(), iter(())
    )
    name = "auxiliary_reconstruction_loss"
    assert trainer.step(make_acts(ROWS, 12)).losses[name] == 0
    trainer.n_forward_passes_since_fired[::3] = 2000
    assert trainer.step(make_acts(ROWS, 12)).losses[name] > 0
    trainer.n_forward_passes_since_fired = torch.zeros(24)
    assert trainer.step(make_acts(ROWS, 12)).losses[name] == 0


def _as_transpose(p: Tensor) -> Tensor:
    return p.T.contiguous().T


@pytest.mark.parametrize("lie", [Tensor.contiguous, _as_transpose])
def test_weights_that_come_to_lie_otherwise_in_memory_train_on(
    lie: Callable[[Tensor], Tensor],
) -> None:
    weights: list[dict[str, Tensor]] = []
    for is_moved in (False, True):
        torch.manual_seed(0)
        crosscoder: TopKTrainingCrosscoder[Any] = make_dfc(training_path="sparse")
        trainer = CrosscoderSAETrainer(sae_trainer_config(ROWS), crosscoder, iter(()))
        for i in range(6):
            if is_moved and i == 3:
                for p in (crosscoder.W_enc, crosscoder.W_dec):
                    p.data = lie(p.data)
            trainer.step(make_acts(ROWS, 12))
        weights.append({name: p.detach() for name, p in crosscoder.named_parameters()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-4)


def test_after_a_step_nothing_but_the_latents_that_fire_is_left_of_the_activations() -> None:
    crosscoder = make_dfc(training_path="sparse")
    trainer = CrosscoderSAETrainer(sae_trainer_config(ROWS), crosscoder, iter(()))
    output = trainer.step(make_acts(ROWS, 12))
    for x in (output.feature_acts, output.hidden_pre):
        assert x.is_sparse and x.is_coalesced()
        assert x.values().numel() <= 6 * ROWS
