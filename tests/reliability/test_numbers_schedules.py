"""Schedules of a million steps: right at chosen steps by their formulas, the same after a resume,
and no memory for each step."""

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from sae_lens_dfc import BatchTopKTrainingCrosscoderConfig, CrosscoderRunnerConfig
from sae_lens_dfc.crosscoders.architectures.dfc import exclusivity_tests
from sae_lens_dfc.training.checkpoint import load_trainer_state, trainer_state
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer
from tests.helpers import make_acts, make_batchtopk, make_dfc, make_standard, sae_trainer_config

STEPS, WARM_UP, DECAY = 1_000_000, 100_000, 200_000
LR, LR_END = 3e-4, 3e-5
CHOSEN = {0, 1, 50_000, 99_999, 100_000, 100_001, 450_000, 799_999, 800_000, 900_000, 999_999}
RESUMED_AT = (50_000, 450_000, 900_000)


def trainer(scheduler: str = "constant", **overrides: Any) -> CrosscoderSAETrainer:
    config = sae_trainer_config(
        2,
        STEPS,
        lr=LR,
        lr_end=LR_END,
        lr_scheduler_name=scheduler,
        lr_warm_up_steps=WARM_UP,
        lr_decay_steps=DECAY,
        **overrides,
    )
    crosscoder = make_standard(l1_coefficient=2.0, l1_warm_up_steps=WARM_UP)
    made = CrosscoderSAETrainer(config, crosscoder, iter(()))
    made.optimizer.step()  # torch wants a step of it before one of the schedule
    return made


def lr_at(step: int, scheduler: str) -> float:
    """The rate of a step by the formula: up on a line, the schedule, down on a line."""
    if step < WARM_UP:
        return LR * (step + 1) / WARM_UP
    end = LR if scheduler == "constant" else LR_END
    if step >= STEPS - DECAY:
        return end * (STEPS - step) / DECAY
    if scheduler == "constant":
        return LR
    share = (step - WARM_UP) / (STEPS - WARM_UP - DECAY)
    return LR_END + (LR - LR_END) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["constant", "cosineannealing"])
def test_the_learning_rate_of_a_million_steps_is_that_of_its_formula(scheduler: str) -> None:
    whole = trainer(scheduler)
    resumed: CrosscoderSAETrainer | None = None
    for step in range(STEPS):
        rate = whole.optimizer.param_groups[0]["lr"]
        if step in CHOSEN:
            assert rate == pytest.approx(lr_at(step, scheduler), rel=1e-6), step
        if resumed is not None:
            assert resumed.optimizer.param_groups[0]["lr"] == rate, step
            assert resumed.get_coefficients() == whole.get_coefficients()
            resumed = resumed if step % 1000 else None
        if step in RESUMED_AT:
            # Not step by step with the other for long: a hundred thousand would say no more.
            resumed = trainer(scheduler)
            load_trainer_state(resumed, trainer_state(whole, step + 1))
        for one in (whole, resumed):
            if one is not None:
                one.lr_scheduler.step()
                one.coefficient_schedulers["l1"].step()
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-6 * LR)


def test_a_penalty_that_rises_over_a_hundred_thousand_steps_is_on_a_line() -> None:
    schedule = trainer().coefficient_schedulers["l1"]
    for step in range(WARM_UP + 2):
        if step % 9_999 == 0 or step >= WARM_UP - 1:
            assert schedule.value == pytest.approx(2.0 * min(step / WARM_UP, 1.0), rel=1e-12)
        schedule.step()


@pytest.mark.parametrize("step", [0, 1, 333_333, 499_999, 500_000, 999_999])
def test_annealing_over_half_a_million_steps_is_on_a_line(step: int) -> None:
    cfg = BatchTopKTrainingCrosscoderConfig(
        d_sae=4096, k=20.0, k_initial=1000.0, k_anneal_steps=500_000
    )
    exact = max(Fraction(20), 20 + 980 * (1 - Fraction(step, 500_000)))
    assert cfg.k_at(step) == pytest.approx(float(exact), rel=1e-12)


def test_as_many_latents_are_kept_as_the_annealing_says_at_each_of_a_million_steps() -> None:
    crosscoder = make_batchtopk(k=2.0, k_initial=20.0, k_anneal_steps=900_000)
    for step in (0, 450_000, 899_999, 900_000, 999_999):
        crosscoder.b_enc.data.fill_(1e3)  # all would fire
        given = TrainStepInput(make_acts(32, 12), {}, None, step, False)
        kept = (crosscoder.training_forward_pass(given).feature_acts != 0).sum().item()
        assert kept == int(32 * crosscoder.cfg.k_at(step))


def test_a_latent_is_dead_after_a_million_steps_and_one_and_not_before() -> None:
    made = CrosscoderSAETrainer(
        sae_trainer_config(2, 2 * STEPS, dead_feature_window=STEPS), make_dfc(), iter(())
    )
    silent = torch.zeros(2, 24)
    silent[:, 0] = 1.0
    made.n_forward_passes_since_fired = torch.full((24,), STEPS - 2.0)
    for n_dead in (0, 0, 23):
        made._count(silent)
        assert int(made.dead_neurons.sum()) == n_dead


def test_tests_late_in_a_million_steps_stand_where_their_shares_say() -> None:
    assert exclusivity_tests([0.8, 0.95], STEPS) == {
        "reassign_steps": [800_000, 950_000],
        "evidence_window": 100_000,
    }


def test_a_trainer_of_a_million_steps_takes_no_more_memory_than_one_of_a_hundred() -> None:
    sae = BatchTopKTrainingCrosscoderConfig(
        d_a=4, d_b=4, d_sae=16, k=2, k_initial=8, k_anneal_steps=50
    )

    def peak(steps: int) -> int:
        tracemalloc.start()
        cfg = CrosscoderRunnerConfig(
            sae=sae,
            training_tokens=64 * steps,
            train_batch_size_tokens=64,
            lr_warm_up_steps=steps // 10,
            lr_decay_steps=steps // 5,
            n_checkpoints=5,
            checkpoint_path="checkpoints",
        )
        made = CrosscoderSAETrainer(cfg.to_sae_trainer_config(), make_batchtopk(), iter(()))
        made.step(make_acts(64, 12))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # what is imported and kept on first use
    assert peak(STEPS) < peak(100) + 20_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, "lr must be above 0 and finite, got nan"),
        ({"lr": math.inf}, "lr must be above 0 and finite, got inf"),
        ({"lr_warm_up_steps": -1}, "lr_warm_up_steps must be at least 0, got -1"),
        ({"lr_decay_steps": -1}, "lr_decay_steps must be at least 0, got -1"),
        ({"dead_feature_window": -1}, "dead_feature_window must be at least 0, got -1"),
        ({"lr_warm_up_steps": 60, "lr_decay_steps": 50}, "leave -10 of 100 steps"),
        ({"lr_decay_steps": 100}, r"10 steps of warm-up .* and 100 of decay .* leave -10"),
        (
            {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 90},
            "leave 0 of 100 steps to the schedule 'cosineannealing'",
        ),
        ({"lr_scheduler_name": "cosine"}, "no lr_scheduler_name 'cosine'. Choose from constant"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and below 1, got 1.0"),
        ({"adam_beta2": math.nan}, "adam_beta2 must be at least 0 and below 1, got nan"),
        ({"activations_mixing_fraction": math.nan}, "activations_mixing_fraction must be"),
        ({"outlier_factor": math.nan}, "outlier_factor must be above 0 and finite, got nan"),
        ({"outlier_factor": math.inf}, "outlier_factor must be above 0 and finite, got inf"),
        ({"n_checkpoints": -1}, "n_checkpoints must be at least 0, got -1"),
    ],
)
def test_a_schedule_that_is_none_is_refused_before_any_model_is_opened(
    settings: dict[str, Any], message: str
) -> None:
    sae = BatchTopKTrainingCrosscoderConfig(d_sae=16, k=2)
    with pytest.raises(ValueError, match=message):
        CrosscoderRunnerConfig(
            sae=sae, training_tokens=6400, train_batch_size_tokens=64, **settings
        )
