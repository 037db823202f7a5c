from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import added, changed, logits, logits_at_end
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from tests.model_classes import MODEL_CLASSES

IDS = torch.tensor([[0, 5, 9, 40], [0, 7, 3, 3]])
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def model(request: pytest.FixtureRequest, llama_config: ModelConfig) -> HookedModel:
    return load_model(replace(llama_config, model_class_name=request.param))


def twice(acts: Tensor) -> Tensor:
    return 2 * acts


def test_a_change_that_changes_nothing_leaves_the_logits_bit_equal(model: HookedModel) -> None:
    before = logits(model, IDS, MASK)
    with changed(model, lambda acts: acts):
        assert torch.equal(logits(model, IDS, MASK), before)


def test_the_model_goes_on_from_what_the_change_gives(model: HookedModel) -> None:
    acts = model.activations(IDS, MASK)
    before = logits(model, IDS, MASK)
    with changed(model, twice):
        doubled = model.activations(IDS, MASK)
        assert not torch.allclose(logits(model, IDS, MASK), before)
    # What is read at the hook is what the model went on from.
    torch.testing.assert_close(doubled, 2 * acts)
    assert torch.equal(logits(model, IDS, MASK), before)


def test_only_its_own_hook_leaves_after_an_exception_too(model: HookedModel) -> None:
    calls: list[int] = []

    def count(tensor: Tensor, *, hook: object) -> None:  # noqa: ARG001
        calls.append(1)

    model.model.add_hook(model.hook_name, count)
    try:
        before = logits(model, IDS, MASK)
        with pytest.raises(KeyError), changed(model, twice):
            raise KeyError
        assert torch.equal(logits(model, IDS, MASK), before)
        assert len(calls) == 2
    finally:
        model.model.reset_hooks()


def test_heads_are_one_vector(llama_config: ModelConfig) -> None:
    model = load_model(replace(llama_config, hook_name="blocks.1.attn.hook_z"))
    shapes: list[tuple[int, ...]] = []
    before = logits(model, IDS, MASK)

    def look(acts: Tensor) -> Tensor:
        shapes.append(tuple(acts.shape))
        return acts

    with changed(model, look):
        assert torch.equal(logits(model, IDS, MASK), before)
    assert shapes == [(2, 4, model.d_model)]


def test_compatibility_mode_calls_a_change_once(llama_config: ModelConfig) -> None:
    model = load_model(llama_config)
    model.model.enable_compatibility_mode(disable_warnings=True)  # type: ignore[operator]
    calls: list[Callable[..., Tensor]] = []
    with changed(model, lambda acts: calls.append(twice) or acts):  # type: ignore[func-returns-value]
        logits(model, IDS, MASK)
    assert len(calls) == 1


def test_a_strength_of_zero_leaves_the_logits_bit_equal(model: HookedModel) -> None:
    before = logits(model, IDS, MASK)
    direction = torch.randn(model.d_model)
    with changed(model, added(0.0 * direction)):
        assert torch.equal(logits(model, IDS, MASK), before)
    with changed(model, added(torch.stack([0.0 * direction, direction]))):
        after = logits(model, IDS, MASK)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_a_direction_is_added_at_every_position(model: HookedModel) -> None:
    direction = torch.arange(model.d_model).float()
    acts = model.activations(IDS, MASK)
    with changed(model, added(direction)):
        torch.testing.assert_close(model.activations(IDS, MASK), acts + direction)


def test_logits_at_some_positions_are_those_of_all(model: HookedModel) -> None:
    full = logits(model, IDS, MASK)
    some = logits(model, IDS, MASK, positions=[3, 1])
    torch.testing.assert_close(some, full[:, [3, 1]])
    assert logits(model, IDS, MASK).shape == full.shape


def test_steering_acts_on_each_new_token_too(model: HookedModel) -> None:
    model.tokenizer.pad_token = "<s>"
    prompts = [[0, 5, 9, 40], [0, 7, 3, 3]]
    # Without a cache, step by step:
    vectors = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(0)) * 3
    expected: list[str] = []
    for ids, vector in zip(prompts, vectors, strict=True):
        read = list(ids)
        with changed(model, added(vector)):
            for _ in range(6):
                row = torch.tensor([read])
                read.append(int(logits(model, row, torch.ones_like(row))[0, -1].argmax()))
        expected.append(str(model.tokenizer.decode(read[4:], skip_special_tokens=True)))
    greedy = Sampling(max_new_tokens=6, temperature=0)
    assert answer(model, prompts, greedy, seed=0, vectors=vectors) == expected
    assert answer(model, prompts, greedy, seed=0) != expected
    unsteered = answer(model, prompts, greedy, seed=0)
    assert answer(model, prompts, greedy, seed=0, vectors=0 * vectors) == unsteered


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_logits_at_the_end_are_those_of_the_whole_model(
    llama_config: ModelConfig, hook: str
) -> None:
    model = load_model(replace(llama_config, hook_name=hook))
    blocks = list(model.model.blocks)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    acts = model.activations(IDS, mask)
    whole = logits(model, IDS, mask)
    found = logits_at_end(model, IDS, mask, acts)
    torch.testing.assert_close(found, torch.stack([whole[0, 3], whole[1, 1]]), atol=1e-4, rtol=1e-4)
    with changed(model, twice):
        doubled = logits(model, IDS, mask)[0, 3]
    other = logits_at_end(model, IDS, mask, 2 * acts)[0]
    torch.testing.assert_close(other, doubled, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError):
        logits_at_end(model, IDS, mask, acts[:, :, :-1])
    assert all(now is before for now, before in zip(model.model.blocks, blocks, strict=True))
