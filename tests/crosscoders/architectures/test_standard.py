from itertools import repeat

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from tests.helpers import make_acts, make_standard, step_input


def test_the_penalty_is_activation_times_the_sum_of_decoder_norms() -> None:
    crosscoder, acts = make_standard(), make_acts(20, 12)
    output = crosscoder.training_forward_pass(step_input(acts))
    W_dec, norms = crosscoder.W_dec, []
    for i in range(24):
        norms.append(W_dec[i, :5].pow(2).sum().sqrt() + W_dec[i, 5:].pow(2).sum().sqrt())
    x = crosscoder._normalize(acts) - crosscoder.b_dec
    fired = (x @ crosscoder.W_enc + crosscoder.b_enc).clamp(min=0)
    expected = 0.5 * (fired @ torch.stack(norms)).mean()  # 0.5 is step_input's coefficient
    torch.testing.assert_close(output.losses["l1_loss"], expected)


def test_every_positive_latent_fires_in_training_and_after() -> None:
    crosscoder, acts = make_standard(), make_acts(20, 12)
    crosscoder.fit_normalization(acts)
    trained, scores = crosscoder.encode_with_hidden_pre(acts)
    assert torch.equal(trained > 0, scores > 0)
    assert torch.equal(crosscoder.eval().encode(acts), trained)


@pytest.mark.slow
def test_the_penalty_warms_up_and_a_higher_one_leaves_fewer_latents_active() -> None:
    l0: dict[float, float] = {}
    acts = make_acts(256, 12)
    for coefficient in (0.1, 10.0):
        torch.manual_seed(0)
        cfg = SAETrainerConfig(
            total_training_samples=256 * 200,
            train_batch_size_samples=256,
            logger=LoggingConfig(log_to_wandb=False),
            lr=1e-2,
            lr_end=1e-3,
        )
        crosscoder = make_standard(l1_coefficient=coefficient, l1_warm_up_steps=100)
        trainer = SAETrainer(cfg, crosscoder, repeat(acts))
        assert trainer.coefficient_schedulers["l1"].value < coefficient / 10
        trainer.fit()
        assert trainer.coefficient_schedulers["l1"].value == coefficient
        l0[coefficient] = (crosscoder.encode(acts) > 0).sum(dim=1).float().mean().item()
    assert l0[10.0] < 0.7 * l0[0.1]


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="l1_coefficient must be at least 0, got -1"):
        make_standard(l1_coefficient=-1)
