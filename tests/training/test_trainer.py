"""Our trainer's step against SAELens' own, and what it must not depend on."""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from sae_lens.config import LoggingConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoder
from sae_lens_dfc.training.checkpoint import load_trainer_state, trainer_state
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer
from tests.helpers import (
    make_acts,
    make_delta,
    make_dfc,
    make_dsf,
    make_standard,
    sae_trainer_config,
)

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


def test_after_a_step_its_graph_is_gone() -> None:
    trainer = CrosscoderSAETrainer(
        sae_trainer_config(ROWS), make_dfc(training_path="sparse"), iter(())
    )
    output = trainer.step(make_acts(ROWS, 12))
    for x in (output.loss, output.sae_out, output.feature_acts, *output.losses.values()):
        assert isinstance(x, Tensor) and x.grad_fn is None


def test_adam_stays_fused_after_a_checkpoint_that_saelens_trainer_made() -> None:
    theirs = trained(SAETrainer, make_dfc)
    ours = CrosscoderSAETrainer(sae_trainer_config(ROWS), make_dfc(), iter(()))
    load_trainer_state(ours, trainer_state(theirs, theirs.n_training_steps))
    assert ours.optimizer.param_groups[0]["fused"]
    ours.step(make_acts(ROWS, 12))


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


class Made(TorchDispatchMode):
    """The memory that was taken, meanwhile, for tensors of at least so many values."""

    def __init__(self, at_least: int):
        super().__init__()
        self.at_least = at_least
        self.storages: list[ReferenceType[UntypedStorage]] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.layout == torch.strided and x.numel() >= self.at_least:
                self.storages.append(ref(x.untyped_storage()))
        return result


@pytest.mark.parametrize("make", [make_dfc, make_dsf, make_delta])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_after_a_step_nothing_but_the_latents_that_fire_is_left_of_the_activations(
    path: str, make: Callable[..., Any]
) -> None:
    # So large that nothing else is: neither a weight nor the reconstructions of two or three parts.
    n_rows, d_sae = 600, 64
    crosscoder = make(training_path=path, d_sae=d_sae)
    trainer = CrosscoderSAETrainer(sae_trainer_config(n_rows), crosscoder, iter(()))
    trainer.step(make_acts(n_rows, 12))
    trainer.n_forward_passes_since_fired[::3] = 1000
    acts = make_acts(n_rows, 12)
    with Made(at_least=n_rows * d_sae) as made:
        output = trainer.step(acts)
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    n_left = sum(storage() is not None for storage in made.storages)
    if path == "dense":
        assert n_left > 0, "this would be seen"
        return
    assert made.storages and n_left == 0
    for x in (output.feature_acts, output.hidden_pre):
        assert x.is_sparse and x.is_coalesced()
        assert x.values().numel() <= 6 * n_rows


@pytest.mark.parametrize("kind", [SAETrainer, CrosscoderSAETrainer])
@pytest.mark.parametrize("make", [make_dfc, make_delta])
def test_what_is_logged_of_a_training_is_that_of_the_dense_path(
    make: Callable[..., Any], kind: type[SAETrainer[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=3)
    logs: list[list[dict[str, float]]] = []
    for path in ("dense", "sparse"):
        own: list[dict[str, float]] = []

        def log(values: dict[str, Any], step: int, own: list[dict[str, float]] = own) -> None:
            numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
            own.append({**numbers, "step": step})

        monkeypatch.setattr("wandb.log", log)
        torch.manual_seed(0)
        cfg = sae_trainer_config(ROWS, 20, logger=logger)
        batches = (make_acts(ROWS, 12) for _ in range(20))
        kind(cfg, make(training_path=path), batches).fit()
        logs.append(own)
    dense, sparse = logs
    losses = [values for values in dense if "losses/overall_loss" in values]
    assert [values["step"] for values in losses] == list(range(1, 20, 2))
    assert 3 < losses[0]["metrics/l0"] <= 6
    assert {"losses/mse_loss_a", "metrics/explained_variance/b"} <= losses[0].keys()
    assert any("sparsity/below_1e-5" in values for values in dense)
    torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-3)
