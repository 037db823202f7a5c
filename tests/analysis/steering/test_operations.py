from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import Change, changed, logits
from sae_lens_dfc.analysis.steering.operations import LatentOperation, latent_change
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.positions import positions_of
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.stats.affine_maps import AffineMaps
from tests.helpers import make_firing_dfc

IDS = torch.tensor([[0, 5, 9, 40], [0, 7, 3, 3]])
MASK = torch.ones_like(IDS)
A, A2, B, SHARED = 1, 4, 7, 20  # of six A-exclusive, four B-exclusive and 14 shared latents


@pytest.fixture(scope="module")
def crosscoder(pair: ModelPair) -> Crosscoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        crosscoder = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    # The tiny models' activations are small: so that the latents tell them apart.
    crosscoder.W_enc.data *= 50
    crosscoder.b_enc.data.zero_()
    crosscoder.b_dec.data.zero_()
    crosscoder.input_scale.copy_(torch.tensor([2.0, 3.0]))
    return crosscoder


@pytest.fixture(scope="module")
def affine_maps(pair: ModelPair) -> AffineMaps:
    generator = torch.Generator().manual_seed(4)
    a_to_b, b_to_a = (
        torch.randn(shape, generator=generator)
        for shape in ((pair.d_a, pair.d_b), (pair.d_b, pair.d_a))
    )
    return AffineMaps(torch.zeros(pair.d_a), torch.zeros(pair.d_b), a_to_b, b_to_a)


MAXIMA = torch.arange(1.0, 25.0)


def acts_when(model: HookedModel, change: Change) -> Tensor:
    with changed(model, change):
        return model.activations(IDS, MASK)


def code(crosscoder: Crosscoder, acts: Tensor, latent: int) -> Tensor:
    """The activation of a latent of A, with noise for B."""
    noise = 100 * torch.randn(*acts.shape[:-1], crosscoder.cfg.d_b)
    return crosscoder.encode(torch.cat([acts, noise], dim=-1))[..., latent, None].detach()


def decoder(crosscoder: Crosscoder, latent: int) -> Tensor:
    return crosscoder.W_dec[latent, : crosscoder.cfg.d_a].detach()


def test_each_operation_writes_what_it_says(model: HookedModel, crosscoder: Crosscoder) -> None:
    x = model.activations(IDS, MASK)
    f, d = code(crosscoder, x, A), decoder(crosscoder, A)
    assert 0 < (f > 0).float().mean() < 1
    expected: dict[Any, Tensor] = {
        ("add", -2.0): x - 2 * 2.0 * d,
        ("scale", 3.0): x + 2 * f * d,
        ("clamp", 0.5): x - f * d + 0.5 * 2.0 * d,
        ("ablate", None): x - f * d,
    }
    for (operation, strength), wanted in expected.items():
        change = latent_change(crosscoder, "a", [LatentOperation(A, operation, strength)], MAXIMA)
        torch.testing.assert_close(acts_when(model, change), wanted, rtol=1e-4, atol=1e-5)


def test_ablation_takes_a_latents_contribution_out_of_the_reconstruction(
    model: HookedModel, crosscoder: Crosscoder
) -> None:
    x = model.activations(IDS, MASK)
    both = torch.cat([x, torch.zeros(*x.shape[:-1], crosscoder.cfg.d_b)], dim=-1)
    f = crosscoder.encode(both).detach()
    without = f.clone()
    without[..., A] = 0
    contribution = (crosscoder.decode(f) - crosscoder.decode(without)).detach()
    found = acts_when(model, latent_change(crosscoder, "a", [LatentOperation(A, "ablate")]))
    torch.testing.assert_close(found, x - contribution[..., :16], rtol=1e-4, atol=1e-5)
    assert contribution.abs().max() > 0.01


@pytest.mark.parametrize(
    "operations",
    [
        [LatentOperation(A, "add", 0.0)],
        [LatentOperation(SHARED, "add", 0.0), LatentOperation(A, "add", -0.0)],
        [LatentOperation(A, "scale", 1.0)],
    ],
)
def test_a_strength_that_changes_nothing_leaves_the_logits_bit_equal(
    model: HookedModel, crosscoder: Crosscoder, operations: list[LatentOperation]
) -> None:
    before = logits(model, IDS, MASK)
    with changed(model, latent_change(crosscoder, "a", operations, MAXIMA)):
        assert torch.equal(logits(model, IDS, MASK), before)
    assert torch.equal(logits(model, IDS, MASK), before)


def test_scaling_by_nothing_and_clamping_to_nothing_are_ablation(
    model: HookedModel, crosscoder: Crosscoder
) -> None:
    ways = [LatentOperation(A, "ablate"), *(LatentOperation(A, o, 0.0) for o in ("scale", "clamp"))]
    first, *others = [
        acts_when(model, latent_change(crosscoder, "a", [way], MAXIMA)) for way in ways
    ]
    assert all(torch.equal(first, other) for other in others)


def test_several_latents_change_what_was_there_before_any(
    model: HookedModel, crosscoder: Crosscoder
) -> None:
    x = model.activations(IDS, MASK)
    operations = [
        LatentOperation(A, "ablate"),
        LatentOperation(SHARED, "add", 0.3),
        LatentOperation(A2, "clamp", 2.0),
    ]
    separate = [
        acts_when(model, latent_change(crosscoder, "a", [o], MAXIMA)) - x for o in operations
    ]
    for order in (operations, operations[::-1]):
        found = acts_when(model, latent_change(crosscoder, "a", order, MAXIMA))
        torch.testing.assert_close(found, x + sum(separate), rtol=1e-4, atol=1e-4)


def test_generation_without_a_latent_is_the_same_with_a_cache_and_without(
    model: HookedModel, crosscoder: Crosscoder
) -> None:
    prompt = [0, 5, 9, 40]
    change = latent_change(
        crosscoder, "a", [LatentOperation(i, "clamp", 3.0) for i in (A, A2)], MAXIMA
    )
    where = positions_of("all", [prompt], first=False)
    expected = list(prompt)
    with changed(model, change, where):
        for _ in range(6):
            row = torch.tensor([expected])
            expected.append(int(logits(model, row, torch.ones_like(row))[0, -1].argmax()))
        [found] = answer(model, [prompt], Sampling(max_new_tokens=6, temperature=0), seed=0)
    assert found == model.tokenizer.decode(expected[4:], skip_special_tokens=True)
    assert [found] != answer(model, [prompt], Sampling(max_new_tokens=6, temperature=0), seed=0)


def test_a_latent_of_one_model_cannot_be_steered_in_the_other(crosscoder: Crosscoder) -> None:
    for model, latent, where in (("b", A, "a"), ("a", B, "b")):
        operation = LatentOperation(latent, "add", 1.0)
        with pytest.raises(
            ValueError,
            match=f"Latent {latent} is {where}_exclusive: it has no decoder in model {model}. Steer model {where}, or",
        ):
            latent_change(crosscoder, model, [operation], MAXIMA)  # type: ignore[arg-type]


def test_a_latent_of_the_other_model_moves_along_the_mapped_direction(
    model: HookedModel, crosscoder: Crosscoder, affine_maps: AffineMaps
) -> None:
    x = model.activations(IDS, MASK)
    change = latent_change(
        crosscoder, "a", [LatentOperation(B, "add", 1.5)], MAXIMA, mapped_by=affine_maps
    )
    step = acts_when(model, change) - x
    moved = crosscoder.W_dec[B, 16:].detach() @ affine_maps.b_to_a
    # As long as B's decoder, on the scale that both models had in training.
    scale = crosscoder.input_scale
    length = crosscoder.W_dec[B, 16:].norm() * scale[1] / scale[0]
    expected = 1.5 * MAXIMA[B] * moved / moved.norm() * length
    torch.testing.assert_close(step, expected.detach().expand_as(step), rtol=1e-4, atol=1e-4)


def test_by_a_map_there_is_no_activation_of_its_own_to_change(
    crosscoder: Crosscoder, affine_maps: AffineMaps
) -> None:
    with pytest.raises(ValueError, match="ablate of latent 7 cannot use a map.*Use add"):
        latent_change(crosscoder, "a", [LatentOperation(B, "ablate")], mapped_by=affine_maps)
    with pytest.raises(ValueError, match="Latent 1 is a_exclusive: it has no decoder in model b"):
        latent_change(
            crosscoder, "a", [LatentOperation(A, "add", 1.0)], MAXIMA, mapped_by=affine_maps
        )


def test_what_one_model_does_not_tell_is_not_guessed_unasked(crosscoder: Crosscoder) -> None:
    for operation in (LatentOperation(SHARED, "ablate"), LatentOperation(SHARED, "clamp", 1.0)):
        with pytest.raises(
            ValueError, match="latent 20 is needed, but the latent is shared and model a alone"
        ):
            latent_change(crosscoder, "a", [LatentOperation(A, "ablate"), operation], MAXIMA)


def test_a_shared_latent_is_read_with_what_stands_in_for_the_other_model(
    model: HookedModel, crosscoder: Crosscoder, affine_maps: AffineMaps
) -> None:
    x = model.activations(IDS, MASK)
    mean = torch.linspace(0.05, -0.05, 24)
    for other, guess in ((affine_maps, x @ affine_maps.a_to_b), (mean, mean.expand(2, 4, -1))):
        f = crosscoder.encode(torch.cat([x, guess], dim=-1))[..., [SHARED]].detach()
        change = latent_change(crosscoder, "a", [LatentOperation(SHARED, "ablate")], other=other)
        expected = x - f * decoder(crosscoder, SHARED)
        torch.testing.assert_close(acts_when(model, change), expected, rtol=1e-4, atol=1e-4)
        assert (f > 0).any()


def test_a_latent_that_does_not_fire_has_no_unit(crosscoder: Crosscoder) -> None:
    silent = MAXIMA.clone()
    silent[A] = 0
    for maxima in (silent, None):
        with pytest.raises(ValueError, match="Latent 1 has no maximum activation"):
            latent_change(crosscoder, "a", [LatentOperation(A, "clamp", 1.0)], maxima)
    latent_change(crosscoder, "a", [LatentOperation(A, "ablate")], silent)


@pytest.mark.parametrize("latents", [[], [3, 3], [24], [-1]])
def test_latents_that_are_not_there_are_refused(crosscoder: Crosscoder, latents: list[int]) -> None:
    operations = [LatentOperation(i, "add", 1.0) for i in latents]
    with pytest.raises(ValueError, match="one or more different latents from 0 to 23"):
        latent_change(crosscoder, "a", operations, MAXIMA)


def test_a_decoder_of_zeros_is_refused() -> None:
    empty = make_firing_dfc(d_a=16, d_b=24)
    empty.W_dec.data[SHARED, :16] = 0
    with pytest.raises(ValueError, match="Latent 20's direction in model a is zero"):
        latent_change(empty, "a", [LatentOperation(SHARED, "add", 1.0)], MAXIMA)


def test_an_operation_says_how_much_it_needs() -> None:
    with pytest.raises(
        ValueError, match=r"each operation but ablate, got add .*Give one, such as 2\.$"
    ):
        LatentOperation(1, "add")
    with pytest.raises(ValueError, match=r"got ablate and 2\.0\. Leave it out\.$"):
        LatentOperation(1, "ablate", 2.0)
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        LatentOperation(1, "add", float("nan"))
    with pytest.raises(ValueError, match="There is no operation 'remove'"):
        LatentOperation(1, "remove", 1.0)
