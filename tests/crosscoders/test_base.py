"""Selection, scales, losses and saving, which all crosscoders in training share."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TrainingSAE
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from sae_lens_dfc import Crosscoder, DSFTrainingCrosscoder
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoder
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.losses import (
    dead_latent_loss,
    dead_latents_decoded,
    reconstruction_losses,
)
from tests.helpers import (
    TOPK_MAKERS,
    make_acts,
    make_batchtopk,
    make_dfc,
    make_dsf,
    make_standard,
    randomized,
    step_input,
    train_steps,
)

MAKERS = [
    make_standard,
    *TOPK_MAKERS.values(),
    *(partial(make, training_path="sparse") for make in TOPK_MAKERS.values()),
]


def slow_forward(crosscoder: TrainingCrosscoder[Any], acts: Tensor) -> dict[str, Any]:
    """A crosscoder's training pass by loops over latents and models, one group's top-k by a
    sort."""
    P, cfg, W_dec = crosscoder.partition, crosscoder.cfg, crosscoder.W_dec
    if isinstance(crosscoder, DSFTrainingCrosscoder):
        W_dec = slow_tied(crosscoder)
    models = [range(P.d_a), range(P.d_a, P.d_in)]
    allowed = {"shared": (0, 1), "a_exclusive": (0,), "b_exclusive": (1,)}
    may_use = [allowed[P.name_of(i)] for i in range(P.d_sae)]
    x = acts.clone()
    for m, dims in enumerate(models):
        x[:, list(dims)] = (x - crosscoder.input_mean)[:, list(dims)] * crosscoder.input_scale[m]
    scores = torch.zeros(len(x), P.d_sae, dtype=x.dtype)
    norms: list[Tensor] = []
    for i in range(P.d_sae):
        parts = torch.stack([W_dec[i, list(models[m])].norm() for m in may_use[i]])
        norms.append(parts.sum() if cfg.decoder_norm == "sum" else parts.pow(2).sum().sqrt())
        for n in range(len(x)):
            pre = crosscoder.b_enc[i]
            for m in may_use[i]:
                for d in models[m]:
                    pre = pre + (x[n, d] - crosscoder.b_dec[d]) * crosscoder.W_enc[d, i]
            scores[n, i] = pre * norms[i]
    kept = scores * (scores > 0)
    budgets = crosscoder.topk_groups() if isinstance(crosscoder, TopKTrainingCrosscoder) else []
    for latents, share in budgets:
        k = share * cfg.k
        values = sorted(scores[:, latents].relu().flatten().tolist(), reverse=True)
        smallest = values[int(k * len(x)) - 1]
        group = scores[:, latents]
        kept[:, latents] = torch.where((group >= smallest) & (group > 0), group, 0)
    out = crosscoder.b_dec.repeat(len(x), 1)
    for i in range(P.d_sae):
        for m in may_use[i]:
            dims = list(models[m])
            out[:, dims] = out[:, dims] + kept[:, [i]] / norms[i] * W_dec[i, dims]
    error = [((out - x)[:, list(dims)] ** 2).sum() / len(x) for dims in models]
    return {"feature_acts": kept, "sae_out": out, "mse_loss_a": error[0], "mse_loss_b": error[1]}


def slow_tied(crosscoder: DSFTrainingCrosscoder) -> Tensor:
    W_dec, d_a = crosscoder.W_dec.clone(), crosscoder.cfg.d_a
    for i in range(6):
        for d in range(crosscoder.cfg.d_b):
            weights = crosscoder.tie_map[:, d]
            W_dec[i, d_a + d] = sum(crosscoder.W_dec[i, j] * weights[j] for j in range(d_a))
    return W_dec


@pytest.mark.parametrize("make", MAKERS)
def test_training_pass_agrees_with_loops_over_latents_and_models(make: Any) -> None:
    crosscoder, acts = make(dtype="float64"), make_acts(10, 12).double()
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    output = crosscoder.training_forward_pass(step_input(acts))
    slow = slow_forward(crosscoder, acts)
    torch.testing.assert_close(output.feature_acts.to_dense(), slow["feature_acts"])
    torch.testing.assert_close(output.sae_out, slow["sae_out"])
    for model in ("a", "b"):
        name = f"mse_loss_{model}"
        torch.testing.assert_close(output.losses[name], slow[name])


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_agree_with_loops_over_latents_and_models(make: Any) -> None:
    crosscoder, acts = make(dtype="float64"), make_acts(10, 12).double()
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    parameters = list(crosscoder.parameters())
    names = ("mse_loss_a", "mse_loss_b")
    losses, slow_losses = (
        crosscoder.training_forward_pass(step_input(acts)).losses,
        slow_forward(crosscoder, acts),
    )
    fast = torch.autograd.grad([losses[n] for n in names], parameters)
    slow = torch.autograd.grad([slow_losses[n] for n in names], parameters)
    for name, one, other in zip(dict(crosscoder.named_parameters()), fast, slow, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}")


class Losses(nn.Module):
    """A training pass as a function of the crosscoder's weights."""

    def __init__(self, crosscoder: TrainingCrosscoder[Any]):
        super().__init__()
        self.crosscoder = crosscoder

    def forward(self, acts: Tensor) -> Tensor:
        dead = torch.arange(self.crosscoder.cfg.d_sae) % 3 == 0
        return self.crosscoder.training_forward_pass(step_input(acts, dead)).loss


@pytest.mark.parametrize(
    "is_projected", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "all"]
)
@pytest.mark.parametrize("make", MAKERS)
def test_gradients_of_the_whole_loss_are_those_of_finite_differences(
    make: Any, is_projected: bool
) -> None:
    crosscoder, acts = make(dtype="float64"), make_acts(10, 12).double()
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    module = Losses(crosscoder)
    # The dead-latent loss holds the residual fixed, which finite differences do not: it is checked
    # by itself.
    crosscoder.cfg.aux_loss_coefficient = 0.0
    names = [name for name, _ in module.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

    def loss(*weights: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (acts,))

    assert gradcheck(loss, values, eps=1e-7, atol=1e-3, fast_mode=is_projected)


def test_the_dead_latent_losss_gradients_are_those_of_finite_differences() -> None:
    partition = make_dfc().partition
    dead = torch.arange(24) % 3 == 0
    residual = torch.randn(6, 12, dtype=torch.float64)

    def loss(scores: Tensor, W_dec: Tensor) -> Tensor:
        decoded = dead_latents_decoded(scores, W_dec, dead, partition, k_aux=3)
        return dead_latent_loss(residual, decoded, 8, k_aux=3)

    scores = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(24, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss, (scores, W_dec))


def test_batchtopk_is_saelens_own_on_the_joined_input() -> None:
    # They coincide where the score is the joined row's norm x activation and the input is taken as
    # it is.
    ours = make_batchtopk(normalization="none", decoder_norm="l2")
    acts = torch.randn(40, 12)
    ours.fit_normalization(acts)
    randomized(ours)
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=12, d_sae=24, k=6, rescale_acts_by_decoder_norm=True)
    )
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    theirs.load_state_dict({**weights, "topk_threshold": torch.tensor(0.0, dtype=torch.double)})
    outputs = [sae.training_forward_pass(step_input=step_input(acts)) for sae in (ours, theirs)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0].feature_acts, outputs[1].feature_acts)
    for output in outputs:
        output.loss.backward()
    for name, p in theirs.named_parameters():
        own = dict(ours.named_parameters())[name].grad
        torch.testing.assert_close(own, p.grad, rtol=1e-5, atol=1e-5, msg=f"gradient of {name}")


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.49), st.floats(0, 0.49))
def test_any_widths_and_partitions_train_and_keep_k_latents(
    d_a: int, d_b: int, a: float, b: float
) -> None:
    d_sae = 20
    a, b = (0.0 if share * d_sae < 1 else share for share in (a, b))
    crosscoder = make_dfc(
        d_a=d_a, d_b=d_b, d_sae=d_sae, a_exclusive_fraction=a, b_exclusive_fraction=b, k=2
    )
    output = crosscoder.training_forward_pass(step_input(make_acts(8, d_a + d_b)))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert (output.feature_acts > 0).sum() <= 2 * 8


@pytest.mark.parametrize("normalization", ["variance", "median_norm"])
def test_each_model_gets_its_own_scale(normalization: Any) -> None:
    crosscoder, acts = make_batchtopk(normalization=normalization), make_acts(500, 12)
    acts[:, :5] *= 1000
    crosscoder.fit_normalization(acts)
    scaled = crosscoder._normalize(acts)
    for x in (scaled[:, :5], scaled[:, 5:]):
        if normalization == "variance":
            torch.testing.assert_close(x.mean(dim=0), torch.zeros(x.shape[1]), atol=1e-3, rtol=0)
            size = x.pow(2).sum(dim=1).mean()
        else:
            size = x.norm(dim=1).median().pow(2)
        assert size.item() == pytest.approx(6, rel=1e-3)  # (5 + 7) / 2


@pytest.mark.parametrize("normalization", ["variance", "median_norm", "none"])
def test_reconstruction_comes_back_in_raw_units(normalization: Any) -> None:
    crosscoder, acts = make_batchtopk(normalization=normalization), make_acts(50, 12)
    crosscoder.fit_normalization(acts)
    again = crosscoder._denormalize(crosscoder._normalize(acts))
    assert (again - acts).norm() < 1e-6 * acts.norm()


@pytest.mark.parametrize("make", MAKERS)
def test_save_load_encode_is_bit_equal(make: Any, tmp_path: Path) -> None:
    acts = make_acts(64, 12)
    trained = train_steps(make(), acts)
    trained.save_inference_model(tmp_path)
    first, again = SAE.load_from_disk(tmp_path), SAE.load_from_disk(tmp_path)
    assert isinstance(first, Crosscoder)
    first.save_model(tmp_path / "again")
    for saved in (first, again, SAE.load_from_disk(tmp_path / "again")):
        assert torch.equal(saved.encode(acts), trained.to_inference().encode(acts))
    assert (first.encode(acts) > 0).any()


@pytest.mark.parametrize("normalization", ["variance", "median_norm", "none"])
@pytest.mark.parametrize("make", MAKERS)
def test_saved_form_gives_on_raw_activations_what_the_trained_one_gave(
    make: Any, normalization: str, tmp_path: Path
) -> None:
    acts = make_acts(64, 12)
    crosscoder = train_steps(make(normalization=normalization), acts).eval()
    crosscoder.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert isinstance(saved, Crosscoder)
    trained_acts, saved_acts = crosscoder.encode(acts), saved.encode(acts)
    assert (trained_acts > 0).any()
    expected = crosscoder.decode(trained_acts)
    assert (saved_acts - trained_acts).norm() < 1e-5 * trained_acts.norm()
    assert (saved.decode(saved_acts) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(saved.forward(acts), crosscoder.to_inference().forward(acts))


def test_saving_leaves_the_trained_weights_alone(tmp_path: Path) -> None:
    crosscoder = train_steps(make_dfc(), make_acts(64, 12))
    before = {name: value.clone() for name, value in crosscoder.state_dict().items()}
    crosscoder.save_inference_model(tmp_path)
    for name, value in crosscoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_checkpoint_restores_scales_and_thresholds(tmp_path: Path) -> None:
    acts = make_acts(64, 12)
    crosscoder = train_steps(make_dfc(), acts).eval()
    crosscoder.save_model(tmp_path)
    restored = TrainingSAE.load_from_disk(tmp_path).eval()
    torch.testing.assert_close(restored.encode(acts), crosscoder.encode(acts))


def test_threshold_follows_the_smallest_selected_score_of_each_group() -> None:
    crosscoder = make_dfc(topk_threshold_lr=0.5, selection="partition")
    acts = make_acts(32, 12)
    expected: list[float] = []
    for step in range(3):
        output = crosscoder.training_forward_pass(step_input(acts))
        for i, (latents, _) in enumerate(crosscoder.topk_groups()):
            group = output.feature_acts[:, latents]
            smallest = group[group > 0].min().item()
            if step == 0:
                expected.append(smallest)
            else:
                expected[i] = (expected[i] + smallest) / 2
        acts = acts + torch.randn_like(acts)
    assert crosscoder.topk_threshold.tolist() == pytest.approx(expected)


def test_losses_are_squared_errors_of_each_model() -> None:
    crosscoder = make_batchtopk(d_a=1, d_b=2)
    losses = reconstruction_losses(
        torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3), crosscoder.partition
    )
    assert losses["mse_loss_a"] == 1 and losses["mse_loss_b"] == 13


@pytest.mark.parametrize(("k_aux", "expected"), [(1, 0.25 + 1.0), (4, (0.25 + 1.0) * 2 / 4)])
def test_dead_latent_loss_is_the_error_of_the_strongest_dead_latents(
    k_aux: int, expected: float
) -> None:
    crosscoder = make_batchtopk(d_a=2, d_b=2, d_sae=3, k=1)
    # Of the dead latents 0 and 2 the stronger, 2, takes part; with room for four both do, for half
    # the weight.
    scores = torch.tensor([[1.0, 9.0, 2.0]])
    W_dec = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    residual = torch.tensor([[0.5, 0.0, 3.0, 0.0]])
    dead = torch.tensor([True, False, True])
    decoded = dead_latents_decoded(scores, W_dec, dead, crosscoder.partition, k_aux)
    loss = dead_latent_loss(residual, decoded, 2, k_aux)
    assert loss.item() == pytest.approx(expected)


def test_after_backward_a_dead_latent_has_a_gradient_and_a_forbidden_weight_has_none() -> None:
    crosscoder, acts = make_dfc(), make_acts(32, 12)
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    with torch.no_grad():
        crosscoder.W_enc[:, [0, 20]] /= 1000  # positive now and then, but never selected
        crosscoder.b_enc[[0, 20]] = 0
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[0, 20]] = True
    output = crosscoder.training_forward_pass(step_input(acts, dead))
    assert (output.feature_acts[:, 20] == 0).all()
    output.loss.backward()
    assert crosscoder.W_dec.grad is not None and crosscoder.W_enc.grad is not None
    assert crosscoder.W_dec.grad[20].abs().sum() > 0
    for inputs, latents in crosscoder.partition.forbidden_blocks():
        assert (crosscoder.W_enc.grad[inputs, latents] == 0).all()
        assert (crosscoder.W_dec.grad[latents, inputs] == 0).all()


def test_the_dead_latent_loss_is_isolated_by_partition() -> None:
    crosscoder, acts = make_dfc(), make_acts(32, 12)
    crosscoder.fit_normalization(acts)
    partition, dead = crosscoder.partition, torch.ones(24, dtype=torch.bool)
    scores, W_dec = torch.rand(32, 24), torch.rand(24, 12)
    gradients: list[Tensor] = []
    residual = torch.randn(32, 12)
    for _ in range(2):
        W = W_dec.clone().requires_grad_()
        decoded = dead_latents_decoded(scores, W, dead, partition, k_aux=3)
        dead_latent_loss(residual, decoded, 24, k_aux=3).backward()
        assert W.grad is not None
        gradients.append(W.grad)
        residual = torch.cat([residual[:, :5], torch.randn(32, 7)], dim=1)  # another residual in B
    a, shared = partition.slices["a_exclusive"], partition.slices["shared"]
    assert torch.equal(gradients[0][a], gradients[1][a]) and (gradients[0][a] != 0).any()
    assert not torch.equal(gradients[0][shared], gradients[1][shared])


def test_one_models_error_gives_the_others_exclusive_latents_no_gradient() -> None:
    crosscoder, acts = make_dfc(), make_acts(32, 12)
    output = crosscoder.training_forward_pass(step_input(acts, torch.arange(24) % 3 == 0))
    output.losses["mse_loss_b"].backward()
    assert crosscoder.W_dec.grad is not None
    assert (crosscoder.W_dec.grad[crosscoder.partition.slices["a_exclusive"]] == 0).all()
    assert (crosscoder.W_dec.grad[crosscoder.partition.slices["shared"]] != 0).any()


def test_encoding_does_not_depend_on_the_other_models_activations() -> None:
    acts = make_acts(16, 12)
    crosscoder = train_steps(make_dfc(), acts).eval()
    changed = acts.clone()
    changed[:, 5:] += 100 * torch.randn(16, 7)
    a = crosscoder.partition.slices["a_exclusive"]
    assert torch.equal(crosscoder.encode(acts)[:, a], crosscoder.encode(changed)[:, a])
    assert not torch.equal(crosscoder.encode(acts), crosscoder.encode(changed))


@pytest.mark.parametrize(
    "write",
    [
        lambda c: train_steps(c, make_acts(32, 12), weight_decay=0.0),
        lambda c: train_steps(c, make_acts(32, 12), weight_decay=0.5),
        lambda c: c.to(torch.bfloat16),
        lambda c: c.to(torch.float64),
        lambda c: (c.fold_W_dec_norm(), c)[1],
        lambda c: (c.load_state_dict({k: plus_one(v) for k, v in c.state_dict().items()}), c)[1],
        lambda c: through_safetensors(c),
        randomized,
    ],
    ids=[
        "adam",
        "weight decay",
        "bfloat16",
        "float64",
        "fold norm",
        "load",
        "safetensors",
        "noise",
    ],
)
@pytest.mark.parametrize("make", [make_dfc, make_dsf])
def test_no_writer_of_weights_makes_the_saved_form_leak_or_breaks_a_tie(
    make: Any, write: Any
) -> None:
    crosscoder = write(make())
    saved = crosscoder.to_inference()
    assert saved.max_forbidden_weight() == 0
    if isinstance(crosscoder, DSFTrainingCrosscoder):
        # Undone the models' scales, the tied latents have one decoder.
        tied = saved.W_dec[:6] * crosscoder._scales()
        assert torch.allclose(tied[:, :6], tied[:, 6:], rtol=1e-5) and tied.abs().sum() > 0


def plus_one(value: Tensor) -> Tensor:
    return value + 1 if value.is_floating_point() else value


def through_safetensors(crosscoder: TrainingCrosscoder[Any]) -> TrainingCrosscoder[Any]:
    with TemporaryDirectory() as folder:
        crosscoder.save_model(folder)
        return TrainingSAE.load_from_disk(folder)  # type: ignore[return-value]


def test_the_saved_forms_exclusive_latents_ignore_the_other_model() -> None:
    crosscoder, acts = train_steps(make_dfc(), make_acts(32, 12)).to_inference(), make_acts(32, 12)
    changed = acts.clone()
    changed[:, 5:] += 100 * torch.randn(32, 7)
    a, shared = (crosscoder.partition.slices[name] for name in ("a_exclusive", "shared"))
    before, after = crosscoder.encode(acts), crosscoder.encode(changed)
    assert torch.equal(before[:, a], after[:, a]) and (before[:, a] > 0).any()
    assert not torch.equal(before[:, shared], after[:, shared])
    only_a = torch.zeros_like(before)
    only_a[:, a] = before[:, a]
    written = crosscoder.decode(only_a) - crosscoder.b_dec
    assert (written[:, 5:] == 0).all() and (written[:, :5] != 0).any()


def test_folding_decoder_norms_changes_nothing_that_is_computed() -> None:
    crosscoder, acts = make_dfc(dtype="float64"), make_acts(32, 12).double()
    crosscoder.fit_normalization(acts)
    before = crosscoder.decode(crosscoder.encode(acts))
    crosscoder.fold_W_dec_norm()
    torch.testing.assert_close(crosscoder.decode(crosscoder.encode(acts)), before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"k": 25}, "k must be above 0 and at most d_sae, got k=25 and d_sae=24"),
        ({"k": 0}, "k must be above 0"),
        (
            {"a_exclusive_fraction": 0.5},
            r"a_exclusive_fraction must be at least 0 and below 0.5, got 0.5",
        ),
        ({"b_exclusive_fraction": -0.1}, r"b_exclusive_fraction must be at least 0 and below 0.5"),
        ({"a_exclusive_fraction": 0.01}, "less than one latent"),
        ({"d_in": 13}, r"d_in=13, but d_a \+ d_b = 12"),
        ({"d_a": -1}, "d_a and d_b must be at least 1"),
        ({"normalize_activations": "layer_norm"}, "puts one scale on both models"),
        ({"apply_b_dec_to_input": False}, "leave apply_b_dec_to_input at True"),
        ({"reshape_activations": "hook_z"}, "reshape_activations at 'none'"),
        ({"dtype": "float16"}, "dtype must be float32 or float64, got 'float16'"),
        (
            {"d_sae": -5, "a_exclusive_fraction": 0, "b_exclusive_fraction": 0},
            "d_sae must be at least 1",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_name(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_dfc(**overrides)


def test_a_crosscoder_without_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="A crosscoder needs both widths"):
        make_dfc(d_a=0, d_b=0)


def test_step_metrics_are_per_model_and_per_partition() -> None:
    crosscoder = make_dfc()
    output = crosscoder.training_forward_pass(step_input(make_acts(32, 12)))
    assert set(output.metrics) == {
        "explained_variance/a",
        "explained_variance/b",
        "l0/a_exclusive",
        "l0/b_exclusive",
        "l0/shared",
    }
