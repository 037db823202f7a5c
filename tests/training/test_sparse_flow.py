"""Steps at the edge of what there is: the sparse path ends where the dense one does, however odd
the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoder
from sae_lens_dfc.crosscoders.partition import zero_forbidden_
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer
from tests.helpers import TOPK_MAKERS, make_acts, randomized, sae_trainer_config

ROWS = 48
WIDTH_1 = {"d_a": 1, "d_b": 1}


class Case(NamedTuple):
    """Settings, and what is done to each batch and before each step."""

    settings: dict[str, Any] = {}
    batch: Callable[[Tensor], Tensor] = lambda acts: acts
    before: Callable[[CrosscoderSAETrainer], None] = lambda trainer: None  # noqa: ARG005


def all_dead(trainer: CrosscoderSAETrainer) -> None:
    trainer.n_forward_passes_since_fired[:] = 1000


def one_dead(trainer: CrosscoderSAETrainer) -> None:
    trainer.n_forward_passes_since_fired[7] = 1000


def none_fires(trainer: CrosscoderSAETrainer) -> None:
    trainer.sae.b_enc.data[:] = -1e6


def none_fires_and_all_are_dead(trainer: CrosscoderSAETrainer) -> None:
    none_fires(trainer)
    all_dead(trainer)


def decoder_has_vanished(trainer: CrosscoderSAETrainer) -> None:
    trainer.sae.W_dec.data.zero_()


def first_row(acts: Tensor) -> Tensor:
    return acts[:1]


def with_one(value: float, acts: Tensor) -> Tensor:
    acts[3, 2] = value
    return acts


def with_a_row_of(value: float, acts: Tensor) -> Tensor:
    acts[3] = value
    return acts


CASES = {
    "an ordinary batch": Case(),
    "one row": Case(batch=first_row),
    "one row, all dead": Case(batch=first_row, before=all_dead),
    "activations in bfloat16": Case(batch=Tensor.bfloat16, before=one_dead),
    "activations in float64": Case(batch=Tensor.double, before=one_dead),
    "activations that lie by columns": Case(batch=lambda acts: acts.T.contiguous().T),
    "float64": Case({"dtype": "float64"}, before=one_dead),
    "fewer scores positive than kept": Case({"k": 20}, before=one_dead),
    "k is d_sae": Case({"k": 24}),
    "none is kept": Case({"k": 0.01}),
    "none is kept of one row": Case({"k": 0.5}, batch=first_row),
    "all dead": Case(before=all_dead),
    "all dead, k_aux above d_sae": Case({"k_aux": 1000}, before=all_dead),
    "no loss of the dead": Case({"aux_loss_coefficient": 0}, before=all_dead),
    "none fires": Case(before=none_fires),
    "none fires, all dead": Case(before=none_fires_and_all_are_dead),
    "no decoder": Case(before=decoder_has_vanished),
    "d_sae of 25": Case({"d_sae": 25}),
    "d_sae of 77": Case({"d_sae": 77}, before=all_dead),
    "d_sae of 130": Case({"d_sae": 130, "k": 3.3}, before=one_dead),
    "widths of 1": Case(WIDTH_1),
    "widths of 1, all dead": Case(WIDTH_1, before=all_dead),
}
NOT_NUMBERS = {
    "one NaN": Case(batch=partial(with_one, torch.nan)),
    "a row of NaN": Case(batch=partial(with_a_row_of, torch.nan)),
    "one infinity": Case(batch=partial(with_one, torch.inf)),
    "a row of infinities": Case(batch=partial(with_a_row_of, torch.inf)),
}
many = pytest.mark.parametrize("make", TOPK_MAKERS.values(), ids=TOPK_MAKERS)


def three_steps(
    make: Callable[..., TopKTrainingCrosscoder[Any]], case: Case, path: str
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses and activations of each step, and what the training has come to."""
    torch.manual_seed(0)
    crosscoder = make(training_path=path, **case.settings)
    crosscoder.fit_normalization(make_acts(ROWS, crosscoder.cfg.d_in))
    randomized(crosscoder)
    zero_forbidden_(crosscoder.W_enc.data, crosscoder.W_dec.data, crosscoder.partition)
    trainer = CrosscoderSAETrainer(sae_trainer_config(ROWS, 20), crosscoder, iter(()))
    steps: list[dict[str, Tensor]] = []
    for _ in range(3):
        case.before(trainer)
        output = trainer.step(case.batch(make_acts(ROWS, crosscoder.cfg.d_in)))
        trainer.n_training_steps += 1
        assert output.feature_acts.is_sparse == (path == "sparse")
        acts = output.feature_acts.to_dense().detach()
        steps.append({**output.losses, "loss": output.loss, "feature_acts": acts})
    end = {**crosscoder.state_dict(), "decoder": crosscoder.decoder().detach()}
    del end["W_dec"]  # a tied row's B side is what anything wrote there
    return steps, {**end, "since_fired": trainer.n_forward_passes_since_fired}


@many
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_paths_come_to_the_same(
    make: Callable[..., TopKTrainingCrosscoder[Any]], case: Case
) -> None:
    dense, sparse = (three_steps(make, case, path) for path in ("dense", "sparse"))
    assert all(x.isfinite().all() for x in dense[1].values())
    torch.testing.assert_close(sparse, dense, rtol=2e-4, atol=2e-4)


@many
@pytest.mark.parametrize("case", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_what_is_not_a_number_is_seen_in_the_loss_and_ends_a_training_on_both_paths(
    make: Callable[..., TopKTrainingCrosscoder[Any]], case: Case
) -> None:
    (dense, dense_end), (sparse, sparse_end) = (
        three_steps(make, case, path) for path in ("dense", "sparse")
    )
    for one, other in zip(dense, sparse, strict=True):
        for name in ("mse_loss_a", "mse_loss_b", "loss"):
            assert one[name].isnan() and other[name].isnan()
    for name in ("W_enc", "decoder", "b_enc", "b_dec"):
        assert dense_end[name].isnan().any() and sparse_end[name].isnan().any()
    assert torch.equal(sparse_end["topk_threshold"].isnan(), dense_end["topk_threshold"].isnan())
