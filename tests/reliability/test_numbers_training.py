"""Training on numbers that no model should give, and with sizes at their edge: finite weights, or
one error that says what to do."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoderConfig,
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DFCTrainingCrosscoderConfig,
    DSFTrainingCrosscoderConfig,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.reassignment import ReassignmentTest
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.crosscoders.sparse_path import firing_counts
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.checkpoint import checkpoints
from sae_lens_dfc.training.recipes.settings import recipe_config
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer, FirstNotFinite
from tests.helpers import (
    TOPK_MAKERS,
    make_acts,
    make_batchtopk,
    make_delta,
    make_dfc,
    make_dsf,
    make_standard,
    sae_trainer_config,
    step_input,
)

ROWS = 32
MAKERS: dict[str, Callable[..., TrainingCrosscoder[Any]]] = {
    "standard": make_standard,
    **TOPK_MAKERS,
    **{f"{n}, sparse": partial(m, training_path="sparse") for n, m in TOPK_MAKERS.items()},
    "dfc, coarse": partial(make_dfc, training_path="sparse", encoder_product="bfloat16"),
    "dfc, tested": partial(make_dfc, reassign_steps=[6, 12], evidence_window=4),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
in_either_format = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])


def trained(make: Callable[..., Any], acts: Tensor, steps: int = 15, **config: Any) -> Any:
    """The crosscoder after some steps on these rows, if the trainer lets it pass."""
    torch.manual_seed(0)
    crosscoder = make(**config.pop("of_crosscoder", {}))
    trainer = CrosscoderSAETrainer(
        sae_trainer_config(len(acts), steps, **config), crosscoder, iter(())
    )
    for _ in range(steps):
        trainer.step(acts)
        trainer.n_training_steps += 1
    trainer.check_finite("it")
    return crosscoder


def with_entry(acts: Tensor, value: float) -> Tensor:
    acts[3 % len(acts), 1] = value
    return acts


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda x: with_entry(x, math.nan), "Model A's activations have no scale.*is nan"),
    "infinity": (lambda x: with_entry(x, math.inf), "Model A's activations have no scale"),
    "denormal": (lambda x: x * 1e-42, "mean square is 0, no more than rounding"),
    "1e30": (lambda x: x * 1e30, r"mean square is inf\. Some are .* too large to be squared"),
    "alike": (lambda x: x[:1].expand(len(x), -1), "All are alike"),
    "alike, 0.1": (lambda x: torch.full_like(x, 0.1), "no more than rounding. All are alike"),
    "zero": (lambda x: 0 * x, "mean square is 0, no more than rounding. All are alike"),
    "one row": (lambda x: x[:1], "over 1 pairs .* give more pairs"),
}


@every
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_activations_without_a_scale_are_refused_at_the_first_step(
    make: Callable[..., Any], change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(make, change(make_acts(ROWS, 12)), steps=1)


@pytest.mark.first_is_fast
@every
@in_either_format
@pytest.mark.parametrize("factor", [1e-15, 1.0, 1e10])
def test_activations_of_any_size_that_can_be_squared_train_alike(
    make: Callable[..., Any], autocast: bool, factor: float
) -> None:
    """Only the scales differ, and the saved form has them in its weights."""
    torch.manual_seed(1)
    acts = make_acts(ROWS, 12)
    saved = trained(make, acts * factor, autocast=autocast).to_inference()
    plain = trained(make, acts, autocast=autocast).to_inference()
    # Rounding may put a latent of equal strength on the other side of its threshold.
    close = partial(torch.testing.assert_close, rtol=0.05, atol=0.05)
    close(saved.encode(acts * factor).sum(dim=-1), plain.encode(acts).sum(dim=-1))
    close(saved(acts * factor) / factor, plain(acts), atol=0.05 * acts.std().item())


@every
@in_either_format
def test_one_row_that_overflows_stops_a_training_that_began_well(
    make: Callable[..., Any], autocast: bool
) -> None:
    acts = make_acts(ROWS, 12)
    crosscoder = make()
    crosscoder.fit_normalization(acts)
    huge = acts.clone()
    huge[2] *= 1e25
    with pytest.raises(ValueError, match="Training diverged: at step 0 .* Lower lr"):
        trained(lambda: crosscoder, huge, steps=2, autocast=autocast)


@every
def test_a_learning_rate_of_a_million_is_found_out_and_its_step_named(
    make: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match=r"at step [1-9] .* \(lr=1e\+06 after 3 steps of warm-up"):
        trained(make, make_acts(ROWS, 12), lr=1e6, lr_end=1e5)


@every
def test_weights_that_are_not_finite_never_become_a_saved_crosscoder(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    crosscoder = make()
    crosscoder.fit_normalization(make_acts(ROWS, 12))
    for value in (math.nan, math.inf):
        crosscoder.b_enc.data[0] = value
        with pytest.raises(ValueError, match="has NaN or infinity in b_enc.* not saved"):
            crosscoder.save_inference_model(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_step_that_was_not_finite_is_the_one_that_is_named() -> None:
    first = FirstNotFinite("cpu")
    assert first.step() is None
    for step, value in enumerate([1.0, 2.0, math.inf, 3.0, math.nan]):
        first.see(torch.tensor(value), step)
    assert first.step() == 2


# --- sizes at their edge ---


WIDTHS = {
    "standard": lambda a, b, n: make_standard(d_a=a, d_b=b, d_sae=n),
    "batchtopk": lambda a, b, n: make_batchtopk(d_a=a, d_b=b, d_sae=n, k=1),
    "batchtopk, sparse": lambda a, b, n: make_batchtopk(
        d_a=a, d_b=b, d_sae=n, k=1, training_path="sparse"
    ),
    "dfc, coarse": lambda a, b, n: make_dfc(
        d_a=a,
        d_b=b,
        d_sae=n,
        k=1,
        training_path="sparse",
        encoder_product="bfloat16",
        a_exclusive_fraction=0.34 if n > 2 else 0.0,
        b_exclusive_fraction=0.34 if n > 2 else 0.0,
    ),
    "dsf": lambda a, b, n: make_dsf(
        d_a=a, d_b=b, d_sae=max(n, 2), k=1, tied_fraction=0.5, k_tied_multiplier=1, tie="linear_map"
    ),
    "delta": lambda a, b, n: make_delta(
        d_a=max(a, b), d_b=max(a, b), d_sae=max(n, 2), k=1, shared_fraction=0.5
    ),
}


@pytest.mark.first_is_fast
@pytest.mark.parametrize("of_sizes", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    ("d_a", "d_b", "d_sae"), [(1, 5, 8), (5, 1, 8), (1, 1, 8), (3, 2, 1), (1, 1, 1)]
)
@in_either_format
def test_a_width_of_one_trains_saves_and_reads(
    of_sizes: Callable[[int, int, int], Any],
    d_a: int,
    d_b: int,
    d_sae: int,
    autocast: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    crosscoder = of_sizes(d_a, d_b, d_sae)
    acts = make_acts(ROWS, crosscoder.cfg.d_in)
    trained(lambda: crosscoder, acts, autocast=autocast)
    crosscoder.save_inference_model(tmp_path)
    read = load_crosscoder(tmp_path)
    crosscoder.eval()
    torch.testing.assert_close(read(acts), crosscoder(acts), rtol=1e-4, atol=1e-3)
    assert read(acts).isfinite().all()
    for model, inputs in read.partition.models.items():
        sae = read.export_sae("a" if model == "a" else "b", rows=[acts])
        assert sae(acts[:, inputs]).isfinite().all()
        json.dumps(sae.cfg.to_dict(), allow_nan=False, default=str)


@pytest.mark.first_is_fast
@every
@in_either_format
def test_a_batch_of_one_trains_once_the_scales_are_known(
    make: Callable[..., Any], autocast: bool
) -> None:
    torch.manual_seed(0)
    crosscoder = make(**({} if make is make_standard else {"k": 8.0}))
    crosscoder.fit_normalization(make_acts(64, 12))
    before = crosscoder.W_dec.detach().clone()
    trained(lambda: crosscoder, make_acts(1, 12), autocast=autocast)
    assert crosscoder.W_dec.isfinite().all() and not torch.equal(crosscoder.W_dec, before)


@every
@in_either_format
def test_where_no_latent_is_positive_none_fires_and_the_training_goes_on(
    make: Callable[..., Any], autocast: bool
) -> None:
    """k x batch is above the positives there are: all of none. Dead latents then learn by their own
    loss."""
    torch.manual_seed(0)
    crosscoder = make()
    acts = make_acts(ROWS, 12)
    crosscoder.fit_normalization(acts)
    crosscoder.b_enc.data.fill_(-1e4)
    dead = torch.ones(24, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = crosscoder.training_forward_pass(step_input(acts, dead))
    output.loss.backward()
    assert firing_counts(output.feature_acts).sum() == 0
    assert output.loss.isfinite() and crosscoder.b_dec.grad.abs().sum() > 0
    saved = crosscoder.to_inference()
    assert (saved.encode(acts) == 0).all()
    torch.testing.assert_close(saved(acts), saved.b_dec.detach().expand_as(acts))
    for model, inputs in saved.partition.models.items():
        sae = saved.export_sae("a" if model == "a" else "b")
        assert sae(acts[:, inputs]).isfinite().all()


def test_a_group_of_latents_that_could_never_fire_is_refused(pair: ModelPair) -> None:
    sae = DFCTrainingCrosscoderConfig(
        d_sae=64, k=2, a_exclusive_fraction=0.02, selection="partition"
    )
    rows = [PairedRows(torch.randn(64, 40), torch.zeros(64).long(), torch.zeros(64).long())]
    cfg = CrosscoderRunnerConfig(
        sae=sae,
        model_a=ModelConfig(hook_name=pair.a.hook_name),
        model_b=ModelConfig(hook_name=pair.b.hook_name),
        training_tokens=640,
        train_batch_size_tokens=16,
    )
    with pytest.raises(
        ValueError, match=r"latents 0 to 0 get 0\.0312 a pair: less than one in all"
    ):
        CrosscoderTrainingRunner(cfg, pair, rows).run()


# --- the whole path ---

SAES: list[CrosscoderTrainingConfig] = [
    StandardTrainingCrosscoderConfig(d_sae=32),
    BatchTopKTrainingCrosscoderConfig(d_sae=32, k=3),
    DFCTrainingCrosscoderConfig(d_sae=32, k=3, a_exclusive_fraction=0.1, b_exclusive_fraction=0.1),
    DSFTrainingCrosscoderConfig(d_sae=32, k=3, tie="linear_map"),
]


def runner(
    pair: ModelPair, rows: Tensor, folder: Path, sae: CrosscoderTrainingConfig, **settings: Any
) -> CrosscoderTrainingRunner:
    numbers = torch.zeros(len(rows)).long()
    given: dict[str, Any] = {
        "training_tokens": 64 * 40,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 1,
        "activations_mixing_fraction": 0.0,  # in the order of the rows
        "n_batches_for_norm_estimate": 4,
        "prefetch_llm_batches": 0,
        "lr": 3e-3,
        "n_checkpoints": 3,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "run"),
        **settings,
    }
    models = {
        "model_a": ModelConfig(hook_name=pair.a.hook_name),
        "model_b": ModelConfig(hook_name=pair.b.hook_name),
    }
    batches = [PairedRows(x, n, n) for x, n in zip(rows.split(64), numbers.split(64), strict=True)]
    return CrosscoderTrainingRunner(
        CrosscoderRunnerConfig(sae=sae, **models, **given), pair, batches
    )


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.architecture())
def test_a_training_that_diverges_saves_nothing_and_keeps_what_it_had(
    sae: CrosscoderTrainingConfig, pair: ModelPair, tmp_path: Path
) -> None:
    rows = make_acts(64 * 50, 40)
    rows[64 * 29 :] *= 1e25  # after the four batches for the scales and 25 steps
    with pytest.raises(ValueError, match=r"Training diverged: at step 25 .* of crosscoder"):
        runner(pair, rows, tmp_path, sae).run()
    assert not (tmp_path / "run").exists()
    kept = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["704", "1344"]
    weights = torch.cat([p.flatten() for p in _weights(kept[-1])])
    assert weights.isfinite().all()


def _weights(checkpoint: Path) -> list[Tensor]:
    return list(load_file(checkpoint / "crosscoder" / "sae_weights.safetensors").values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused_before_training(
    value: float, pair: ModelPair, tmp_path: Path
) -> None:
    rows = make_acts(64 * 5, 40)
    rows[64 * 3 + 7, 11] = value
    with pytest.raises(
        ValueError, match="1 of 5 batches .* hold NaN or infinity; the first is number 3"
    ):
        runner(pair, rows, tmp_path, SAES[1])


def test_the_tested_recipe_trains_on_activations_that_are_always_the_same_in_one_dimension(
    pair: ModelPair, tmp_path: Path
) -> None:
    rows = make_acts(64 * 60, 40)
    rows[:, ::3] = 7.0
    recipe = recipe_config("dfc-reassigned", sae={"d_sae": 32, "k": 3.0})
    runner(pair, rows, tmp_path, recipe.sae, reassign_at=[0.5, 0.9]).run()
    assert all(x.isfinite().all() for x in load_crosscoder(tmp_path / "run").state_dict().values())


def test_a_latent_that_is_always_on_is_not_judged_by_what_rounding_leaves() -> None:
    """Its variance is the difference of two equal sums: divided by that, chance would be a slope of
    any size."""
    torch.manual_seed(0)
    test = ReassignmentTest(Partition(d_a=2, d_b=2, n_a_exclusive=2, n_b_exclusive=0, n_shared=1))
    for _ in range(40):
        acts = torch.rand(100, 2)
        acts[:, 0] = 3.3
        unshared = torch.randn(100, 4)
        unshared[:, 2] += acts[:, 1]
        test.update(acts, unshared)
    found = test.compute()["a_exclusive"]
    assert found.enough.tolist() == [False, True]
    assert found.slopes[0].abs().sum() == 0 and found.own_share[0] == 1
    assert found.own_share[1] == pytest.approx(0.5, abs=0.1)


# --- any numbers at all ---

ANYTHING = arrays(
    "float32",
    (8, 12),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=ANYTHING, normalization=st.sampled_from(["variance", "median_norm", "none"]))
def test_scales_of_any_numbers_are_finite_or_refused(values: Any, normalization: Any) -> None:
    acts = torch.from_numpy(values)
    crosscoder = make_batchtopk(normalization=normalization)
    try:
        crosscoder.fit_normalization(acts)
    except ValueError as error:
        assert "have no scale" in str(error)
        return
    assert acts.isfinite().all()
    assert (crosscoder.input_scale > 0).all() and crosscoder.input_scale.isfinite().all()
    assert crosscoder.input_mean.isfinite().all()


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=arrays(
        "float32",
        (8, 12),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True),
    ),
    kind=st.sampled_from(sorted(MAKERS)),
)
def test_training_on_any_numbers_ends_finite_or_is_refused(values: Any, kind: str) -> None:
    try:
        crosscoder = trained(MAKERS[kind], torch.from_numpy(values), steps=3)
        saved = crosscoder.to_inference()
    except ValueError as error:
        known = ("have no scale", "Training diverged", "needs at least", "No linear map")
        assert any(text in str(error) for text in known), error
        return
    assert all(p.isfinite().all() for p in crosscoder.parameters())
    assert saved.W_dec.isfinite().all()


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (make_batchtopk, "k", [math.nan, math.inf, 0.0, -1.0]),
        (make_batchtopk, "topk_threshold_lr", [math.nan, 0.0, -0.1, 1.5, math.inf]),
        (make_batchtopk, "aux_loss_coefficient", [math.nan, -1.0, math.inf]),
        (make_batchtopk, "decoder_init_norm", [math.nan, 0.0, -1.0, math.inf]),
        (make_standard, "l1_coefficient", [math.nan, -1.0, math.inf]),
        (make_dsf, "tied_fraction", [math.nan, -1.0, math.inf, 2.0]),
        (make_dsf, "k_tied_multiplier", [math.nan, -1.0, math.inf]),
        (make_delta, "shared_fraction", [math.nan, -1.0, math.inf, 2.0]),
        (make_delta, "k_shared_ratio", [math.nan, 0.0, math.inf]),
        (make_delta, "delta_loss_coefficient", [math.nan, -1.0, math.inf]),
        (make_dfc, "a_exclusive_fraction", [math.nan, -0.1, 0.5, math.inf]),
        (make_dfc, "min_own_share", [math.nan, 0.5, 1.0, math.inf]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_setting_that_is_no_number_is_refused_by_its_name(
    make: Callable[..., Any], name: str, values: list[float]
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            make(**{name: value})
