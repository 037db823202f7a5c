"""The sparse path against the dense definition: the same losses, gradients and training."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck
from transformer_lens.hook_points import HookPoint

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoder,
    DFCTrainingCrosscoder,
    ToyPair,
    ToyPairConfig,
)
from sae_lens_dfc.crosscoders import selection, sparse_path
from sae_lens_dfc.crosscoders.architectures import topk
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoder
from sae_lens_dfc.crosscoders.partition import (
    Partition,
    decode_blocks,
    encode_blocks,
    max_forbidden_weight,
    zero_forbidden_,
)
from sae_lens_dfc.crosscoders.selection import largest, topk_candidates
from sae_lens_dfc.crosscoders.sparse_path import (
    DenseBlock,
    PreActivations,
    SparseActs,
    Weights,
    products,
    reconstruct,
)
from sae_lens_dfc.training import trainer
from tests.helpers import (
    TOPK_MAKERS,
    dfc_config,
    make_acts,
    make_batchtopk,
    make_dfc,
    randomized,
    sae_trainer_config,
    step_input,
)

Make = Callable[..., TopKTrainingCrosscoder[Any]]
SIZES = {"d_a": 20, "d_b": 20, "d_sae": 300, "k": 7.5}
OTHER_WIDTHS = {"dsf by a map": {"d_b": 30}, "dfc": {"d_b": 30}}
MAKERS: dict[str, Make] = {
    name: partial(make, **{**SIZES, **OTHER_WIDTHS.get(name, {})})
    for name, make in TOPK_MAKERS.items()
}
many = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
PARTITION = Partition(d_a=3, d_b=4, n_a_exclusive=2, n_b_exclusive=3, n_shared=6)


def step(
    make: Make, path: str, acts: Tensor, **overrides: Any
) -> tuple[TrainStepOutput, dict[str, Tensor]]:
    """A step and its gradients, each by its largest, from the same weights whatever the path."""
    torch.manual_seed(0)
    crosscoder = make(training_path=path, **overrides)
    crosscoder.fit_normalization(acts)
    randomized(crosscoder)
    dead = torch.rand(crosscoder.cfg.d_sae) < 0.3
    output = crosscoder.training_forward_pass(step_input(acts, dead))
    output.loss.backward()
    output.metrics["thresholds"] = crosscoder.topk_threshold
    gradients = {n: p.grad for n, p in crosscoder.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    return output, {n: gradient / gradient.abs().max() for n, gradient in gradients.items()}


@many
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("k_aux", [10, 60, 200])  # of 90 dead latents: so few one by one
def test_losses_and_gradients_are_those_of_the_dense_path(
    make: Make, dtype: str, tolerance: float, k_aux: int
) -> None:
    acts = make_acts(120, make().cfg.d_in).to(getattr(torch, dtype))
    (dense, expected), (sparse, gradients) = (
        step(make, path, acts, dtype=dtype, k_aux=k_aux) for path in ("dense", "sparse")
    )
    assert sparse.feature_acts.is_sparse and not dense.feature_acts.is_sparse
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    assert sparse.losses.keys() == dense.losses.keys() >= {"auxiliary_reconstruction_loss"}
    for name, loss in dense.losses.items():
        close(sparse.losses[name], loss, msg=lambda m, name=name: f"{name}: {m}")
    close(sparse.feature_acts.to_dense(), dense.feature_acts)
    close(sparse.sae_out, dense.sae_out)
    close(gradients, expected)
    close(sparse.metrics, dense.metrics)


@many
def test_a_budget_of_less_than_one_latent_keeps_none_on_either_path(make: Make) -> None:
    acts = make_acts(60, make().cfg.d_in)
    (dense, expected), (sparse, gradients) = (
        step(make, path, acts, k=0.01) for path in ("dense", "sparse")
    )
    assert (sparse.feature_acts.to_dense() == 0).all()
    torch.testing.assert_close(sparse.losses, dense.losses)
    torch.testing.assert_close(gradients, expected)


def test_second_derivatives_are_refused() -> None:
    crosscoder = make_batchtopk(training_path="sparse")
    loss = crosscoder.training_forward_pass(step_input(make_acts(20, 12))).loss
    (gradient,) = torch.autograd.grad(loss, crosscoder.W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def rebuilt(x: Tensor, weights: Weights, mask: Tensor) -> Tensor:
    pre = PreActivations.of((x - weights.b_dec).detach(), weights.W_enc, weights.b_enc, PARTITION)
    rows, latents = mask.nonzero(as_tuple=True)
    chosen = pre.at(rows, latents)
    half = chosen.where(torch.arange(len(chosen.rows)) % 2 == 0)
    some = torch.tensor([1, 4, 9])
    choices = {"all": chosen, "some": DenseBlock(some, pre.of_latents(some)), "half": half}
    found = reconstruct(x, weights, choices, PARTITION)
    return torch.cat([found["all"] + weights.b_dec, found["half"], found["some"]])


def some_weights() -> Weights:
    W_enc, b_enc, W_dec, b_dec = (torch.randn(s).double() for s in ((11, 7), 11, (11, 7), 7))
    zero_forbidden_(W_enc.T, W_dec, PARTITION)
    return Weights(W_enc.T, b_enc, W_dec, b_dec)


@pytest.mark.slow
def test_encoding_and_decoding_have_the_gradients_of_finite_differences() -> None:
    mask = torch.rand(5, 11) < 0.4
    x = torch.randn(5, 7, dtype=torch.double)

    def whole(x: Tensor, *weights: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = (weight.clone() for weight in weights)
        zero_forbidden_(W_enc, W_dec, PARTITION)
        return rebuilt(x, Weights(W_enc, b_enc, W_dec, b_dec), mask)

    inputs = [t.detach().requires_grad_() for t in (x, *some_weights())]
    assert gradcheck(whole, inputs)


def test_what_is_rebuilt_is_the_dense_product_of_what_was_chosen() -> None:
    mask, x, weights = torch.rand(5, 11) < 0.4, torch.randn(5, 7).double(), some_weights()
    W_enc, b_enc, W_dec, b_dec = weights
    every = (encode_blocks(x - b_dec, W_enc, PARTITION) + b_enc).relu()
    acts, some = every * mask, torch.zeros(11).index_fill_(0, torch.tensor([1, 4, 9]), 1)
    half = torch.zeros(5, 11, dtype=torch.double)
    half[mask] = (torch.arange(int(mask.sum())) % 2 == 0).double()
    expected = torch.cat(
        [
            decode_blocks(acts, W_dec, PARTITION) + b_dec,
            decode_blocks(acts * half, W_dec, PARTITION),
            decode_blocks(every * some, W_dec, PARTITION),
        ]
    )
    torch.testing.assert_close(rebuilt(x, weights, mask), expected)


def test_the_product_is_that_of_the_blocks_wherever_they_begin() -> None:
    # Blocks that meet within a strip of 64 latents, on its border, and several in one.
    for n_a, n_b, n_shared in [(70, 90, 200), (64, 64, 72), (3, 5, 300), (0, 130, 10), (1, 0, 8)]:
        partition = Partition(6, 9, n_a, n_b, n_shared)
        x, W_enc = torch.randn(4, 15), torch.randn(partition.d_sae, 15).T
        for inputs, latents in partition.forbidden_blocks():
            W_enc[inputs, latents] = 0
        b_enc = torch.randn(partition.d_sae)
        pre = PreActivations.of(x, W_enc, b_enc, partition)
        torch.testing.assert_close(pre.product, encode_blocks(x, W_enc, partition) + b_enc)


def test_products_are_those_of_the_whole_matrix() -> None:
    x, y, mask = torch.randn(6, 5), torch.randn(9, 5), torch.rand(6, 9) < 0.3
    rows, latents = mask.nonzero(as_tuple=True)
    torch.testing.assert_close(products(x, y, rows, latents), (x @ y.T)[mask])


def test_groups_chosen_apart_are_joined_in_order() -> None:
    mask, pre = torch.rand(6, 9) < 0.5, torch.randn(6, 9)
    parts = [torch.zeros_like(mask), torch.zeros_like(mask)]
    parts[0][:, :4], parts[1][:, 4:] = mask[:, :4], mask[:, 4:]
    groups = [SparseActs(part.nonzero()[:, 0], part.nonzero()[:, 1], pre[part]) for part in parts]
    joined = SparseActs.joined(groups, d_sae=9)
    assert torch.equal(torch.stack([joined.rows, joined.latents], dim=1), mask.nonzero())
    assert torch.equal(joined.pre, pre[mask])


# --- what may be written by others ---


def test_a_forbidden_weight_that_anything_writes_never_takes_part() -> None:
    acts = make_acts(60, 12)
    crosscoder = make_dfc(training_path="sparse")
    expected = crosscoder.training_forward_pass(step_input(acts)).loss
    with torch.no_grad():
        for inputs, latents in crosscoder.partition.forbidden_blocks():
            crosscoder.W_enc[inputs, latents] = torch.nan
            crosscoder.W_dec[latents, inputs] = 1e9
    output = crosscoder.training_forward_pass(step_input(acts))
    assert torch.equal(output.loss, expected)
    output.loss.backward()
    assert max_forbidden_weight(crosscoder.W_enc, crosscoder.W_dec, crosscoder.partition) == 0
    assert crosscoder.W_enc.grad is not None and crosscoder.W_dec.grad is not None
    assert (
        max_forbidden_weight(crosscoder.W_enc.grad, crosscoder.W_dec.grad, crosscoder.partition)
        == 0
    )


def test_a_weight_that_is_not_a_number_is_seen_in_the_loss() -> None:
    for path in ("dense", "sparse"):
        crosscoder = make_dfc(training_path=path)
        with torch.no_grad():
            crosscoder.W_enc[:, 20] = torch.nan
        output = crosscoder.training_forward_pass(step_input(make_acts(40, 12)))
        assert output.loss.isnan()


def test_encoders_that_lie_in_memory_by_rows_train_all_the_same() -> None:
    acts, gradients = make_acts(60, 12), []
    for by_rows in (True, False):
        torch.manual_seed(0)
        crosscoder = make_dfc(training_path="sparse")
        if by_rows:
            crosscoder.W_enc.data = crosscoder.W_enc.data.contiguous()
        crosscoder.training_forward_pass(step_input(acts)).loss.backward()
        gradients.append(crosscoder.W_enc.grad)
        assert crosscoder.W_enc.grad is not None
        assert crosscoder.W_enc.grad.stride() == crosscoder.W_enc.stride()
    torch.testing.assert_close(gradients[0], gradients[1])


# --- which path ---


@pytest.mark.parametrize(
    ("n_rows", "d_sae", "k", "is_sparse"),
    [
        (512, 128, 4, True),
        (511, 128, 4, False),  # fewer than 2^16 scores
        (512, 128, 32, True),
        (512, 128, 33, False),  # more than a quarter of them kept
    ],
)
def test_the_path_is_the_faster_one(n_rows: int, d_sae: int, k: float, is_sparse: bool) -> None:
    crosscoder = make_batchtopk(d_sae=d_sae, k=k)
    output = crosscoder.training_forward_pass(step_input(make_acts(n_rows, 12)))
    assert output.feature_acts.is_sparse == is_sparse


@pytest.mark.parametrize("is_torchs", [False, True])
def test_hooks_on_the_latents_see_dense_activations(is_torchs: bool) -> None:
    crosscoder, seen = make_batchtopk(training_path="sparse"), list[Tensor]()

    def see(tensor: Tensor, *, hook: HookPoint) -> None:  # noqa: ARG001
        seen.append(tensor)

    if is_torchs:
        crosscoder.hook_sae_acts_post.register_forward_hook(lambda *args: seen.append(args[2]))
    else:
        crosscoder.hook_sae_acts_post.add_hook(see)
    output = crosscoder.training_forward_pass(step_input(make_acts(20, 12)))
    assert torch.equal(seen[0], output.feature_acts) and not seen[0].is_sparse


class OwnLoss(BatchTopKTrainingCrosscoder):
    """One latent's activations are to be small: SAELens' place for a loss of one's own."""

    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(*args, **kwargs)
        return {**losses, "own": kwargs.get("feature_acts", args[1])[:, 0].sum()}


def test_an_architecture_with_a_loss_of_its_own_trains_on_the_path_that_has_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crosscoder = OwnLoss(make_batchtopk(training_path="sparse").cfg)
    for _ in range(2):
        assert "own" in crosscoder.training_forward_pass(step_input(make_acts(20, 12))).losses
    assert caplog.text.count("the step is dense") == 1


def test_a_coarse_product_needs_the_sparse_path() -> None:
    with pytest.raises(ValueError, match="encoder_product='bfloat16' is for the sparse path"):
        dfc_config(training_path="dense", encoder_product="bfloat16")


# --- selection ---


def sorted_choice(scores: Tensor, n: int) -> Tensor:
    """Flat indices of the n largest positive scores, by a sort."""
    order = scores.flatten().argsort(descending=True, stable=True)[:n]
    return order[scores.flatten()[order] > 0].sort().values


def chosen(pre: Tensor, norms: Tensor, n: int) -> Tensor:
    rows, latents = topk_candidates(pre, norms, n)
    flat = rows * pre.shape[1] + latents
    assert torch.equal(flat, flat.unique())
    scores = pre[rows, latents].relu() * norms[latents]
    kept = largest(scores, n)
    return flat[kept[scores[kept] > 0]]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 70),
    st.floats(0, 1),
    st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_the_largest_are_found_as_by_a_sort(
    seed: int, n_rows: int, n_latents: int, share: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(n_rows, n_latents, generator=generator) + shift
    # Rows of many sizes: one in 63 scores says little of them.
    pre *= torch.rand(n_rows, 1, generator=generator).pow(3)
    norms = torch.rand(n_latents, generator=generator) + 0.01
    n = int(share * pre.numel())
    assert torch.equal(chosen(pre, norms, n), sorted_choice(pre * norms, n))


def test_a_guess_that_sees_none_of_the_large_scores_is_mended() -> None:
    pre = torch.rand(70, 90) / 1000
    pre[1::7] += 1  # of every seventh row from the first on the guess is made
    assert torch.equal(chosen(pre, torch.ones(90), 100), sorted_choice(pre, 100))
    pre = torch.rand(70, 90) - 1
    pre[3, 4] = 1
    assert chosen(pre, torch.ones(90), 100).tolist() == [3 * 90 + 4]


def test_of_equal_scores_no_more_than_asked_for_are_kept() -> None:
    pre = torch.ones(20, 30)
    rows, latents = topk_candidates(pre, torch.ones(30), 50)
    assert len(largest(pre[rows, latents], 50)) == 50


def test_few_more_candidates_are_looked_at_than_are_kept() -> None:
    pre, n = torch.randn(700, 900), 20_000
    assert n <= len(topk_candidates(pre, torch.rand(900) + 1, n)[0]) <= 1.5 * n


@many
def test_on_a_gpu_the_same_are_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    acts = make_acts(120, make().cfg.d_in)
    here, gradients = step(make, "sparse", acts)
    for module in (selection, sparse_path, topk):
        monkeypatch.setattr(module, "would_wait", lambda x: True)  # noqa: ARG005
    there, gradients_there = step(make, "sparse", acts)
    torch.testing.assert_close(there.losses, here.losses)
    torch.testing.assert_close(gradients_there, gradients)
    torch.testing.assert_close(there.metrics, here.metrics)


@pytest.mark.first_is_fast
@many
@pytest.mark.parametrize("product", ["exact", "bfloat16"])
@pytest.mark.parametrize("k_aux", [2, 10])
def test_on_a_gpu_nothing_is_waited_for(
    make: Make, product: str, k_aux: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (selection, sparse_path, topk):
        monkeypatch.setattr(module, "would_wait", lambda x: True)  # noqa: ARG005
    monkeypatch.setattr(trainer, "read_later", lambda x: lambda: 20)  # noqa: ARG005
    crosscoder = make(training_path="sparse", k_aux=k_aux, encoder_product=product)
    training = trainer.CrosscoderSAETrainer(sae_trainer_config(120), crosscoder, iter(()))
    training.step(make_acts(120, crosscoder.cfg.d_in))
    # A CSR matrix cannot be without values.
    monkeypatch.setattr(
        sparse_path, "products", lambda x, y, rows, _latents: rows * x[0, 0] * y[0, 0]
    )
    # Views of the same memory, which a parameter with values cannot take of tensors without.
    monkeypatch.setattr(trainer, "contiguous_for_fused_adam", lambda optimizer: nullcontext())  # noqa: ARG005
    # A tensor without values refuses whatever depends on them, such as a number for Python or a
    # shape.
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = training.step(torch.empty(120, crosscoder.cfg.d_in))
    assert isinstance(output.loss, FakeTensor)
    assert "auxiliary_reconstruction_loss" in output.losses


# --- the product in bfloat16 ---


def toy_batches(n: int, n_rows: int) -> Iterator[Tensor]:
    pair = ToyPair(ToyPairConfig(n_features=200, d_a=24, d_b=32))
    return islice(pair.batches(n_rows), n)


TOY = {"d_a": 24, "d_b": 32, "d_sae": 256, "k": 6, "aux_loss_coefficient": 1 / 32}


def curve(n: int, **overrides: Any) -> Tensor:
    """Losses of a training from one seed on one text."""
    torch.manual_seed(0)
    crosscoder = DFCTrainingCrosscoder(dfc_config(**TOY, **overrides))
    training = trainer.CrosscoderSAETrainer(sae_trainer_config(256, n), crosscoder, iter(()))
    losses: list[float] = []
    for batch in toy_batches(n, 256):
        losses.append(training.step(batch).loss.item())
        training.n_training_steps += 1
    return torch.tensor(losses, dtype=torch.double)


# What float32 rounds off grows over the steps, and by how much depends on the processor.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.05), ("float64", 1e-9)])
def test_training_on_the_sparse_path_is_training_on_the_dense_one(
    dtype: str, tolerance: float
) -> None:
    dense, sparse = (curve(200, training_path=path, dtype=dtype) for path in ("dense", "sparse"))
    assert dense[-1] < dense[0] / 2
    torch.testing.assert_close(sparse, dense, rtol=tolerance, atol=0)


def test_a_coarse_product_finds_the_latents_that_the_exact_one_finds() -> None:
    acts = make_acts(200, 40)
    outputs = [
        step(MAKERS["batchtopk"], "sparse", acts, encoder_product=product)[0]
        for product in ("exact", "bfloat16")
    ]
    exact, coarse = (output.feature_acts.to_dense() for output in outputs)
    torch.testing.assert_close(coarse, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_coarse_product_leaves_the_training_as_it_is() -> None:
    exact, coarse = (
        curve(200, training_path="sparse", encoder_product=p) for p in ("exact", "bfloat16")
    )
    # Two trainings part at the first rounding, whatever its size: not each step is alike, but where
    # they come to.
    assert coarse[-50:].mean() == pytest.approx(exact[-50:].mean().item(), rel=5e-3)


def test_under_autocast_the_product_alone_is_coarse() -> None:
    acts = make_acts(200, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast, _ = step(MAKERS["batchtopk"], "sparse", acts)
    coarse, _ = step(MAKERS["batchtopk"], "sparse", acts, encoder_product="bfloat16")
    assert torch.equal(autocast.loss, coarse.loss) and autocast.loss.dtype == torch.float32
