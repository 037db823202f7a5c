"""A pair whose difference is known to the last digit: one model, and it with a direction added
where a latent fires."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from sae_lens_dfc.analysis.causal.activation_patching import (
    ModelSpecificDirection,
    Texts,
    drawn_directions,
    own_part,
    texts_of,
    verify,
)
from sae_lens_dfc.analysis.causal.shared_vocabulary import jensen_shannon
from sae_lens_dfc.analysis.steering.hooks import logits_at_end
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import ModelConfig, ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps, have_one_basis
from sae_lens_dfc.stats.moments import PairMoments
from sae_lens_dfc.stats.significance import Effect, interval

TEXTS = ["The cat sat on the mat.", "In 1989 the cat sat", "The mat is on the cat", "A cat, a mat"]


def crosscoder_of(w_dec: list[list[float]], d_a: int) -> Crosscoder:
    w = torch.tensor(w_dec)
    crosscoder = Crosscoder(
        CrosscoderConfig(d_in=w.shape[1], d_sae=len(w), d_a=d_a, d_b=w.shape[1] - d_a)
    )
    crosscoder.W_dec.data = w
    return crosscoder


# --- what is a model's own ---


def test_what_is_bs_own_would_have_to_be_added_to_a() -> None:
    of_a, of_b = both_decoder_differences(
        crosscoder_of([[1.0, 2, 1, 5], [0, 0, 3, 4]], d_a=2), None
    )
    assert of_b.tolist() == [[0.0, 3.0], [3.0, 4.0]] and torch.equal(of_a, -of_b)
    own = own_part(of_a, of_b, 0, "b")
    assert own.own.tolist() == [0.0, 3.0] and own.moved.tolist() == [0.0, 3.0]
    assert own_part(of_a, of_b, 0, "a").own.tolist() == [0.0, -3.0]


def test_an_exclusive_latents_own_part_is_its_decoder_and_moves_by_the_map() -> None:
    crosscoder = crosscoder_of([[0.0, 0, 3, 4, 0]], d_a=2)
    affine_maps = AffineMaps(
        mean_a=torch.zeros(2),
        mean_b=torch.zeros(3),
        a_to_b=torch.zeros(2, 3),
        b_to_a=torch.tensor([[0.0, 0], [0, 0.1], [0, 0]]),
    )
    own = own_part(*both_decoder_differences(crosscoder, affine_maps), 0, "b")
    assert own.own.tolist() == [3.0, 4.0, 0.0]
    # As long as it was, along what the map makes of it.
    torch.testing.assert_close(own.moved, torch.tensor([0.0, 5.0]))


def test_one_basis_is_told_from_two() -> None:
    acts = torch.randn(500, 6)
    tuned = torch.cat([acts, acts + 0.1 * torch.randn(500, 6) + 7], dim=1)
    turned = torch.cat([acts, acts @ torch.linalg.qr(torch.randn(6, 6)).Q], dim=1)
    assert have_one_basis(PairMoments.of([tuned]), 6)
    assert not have_one_basis(PairMoments.of([turned]), 6)
    assert not have_one_basis(PairMoments.of([torch.randn(50, 7)]), 3)


# --- effects ---


def test_a_p_value_is_that_of_the_paired_test_against_the_kind_that_does_most() -> None:
    values = torch.tensor([1.0, 1.5, 0.7, 1.2])
    controls = {"weak": torch.zeros(3, 4), "strong": torch.rand(5, 4)}
    expected = ttest_rel(
        values.double().numpy(),
        controls["strong"].mean(dim=0).double().numpy(),
        alternative="greater",
    )
    assert Effect(values, controls).p == pytest.approx(float(np.asarray(expected)[1]), rel=1e-5)
    assert Effect(values, {"weak": controls["weak"]}).p < Effect(values, controls).p
    assert Effect(values[:2], {"weak": torch.zeros(3, 2)}).p == Effect(values, {}).p == 1.0


def test_an_interval_holds_the_mean_and_narrows_with_more_texts() -> None:
    low, high = interval(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert 0 < low < 1.5 < high < 3
    wide = interval(torch.tensor([0.0, 1.0, 2.0, 3.0] * 20))
    assert wide[1] - wide[0] < high - low


# --- the causal test ---


@pytest.fixture(scope="module")
def twins(llama_config: ModelConfig) -> ModelPair:
    """Two copies of one model that are read at one place."""
    config = replace(llama_config, hook_name="blocks.0.hook_resid_post")
    return ModelPair.load(config, config)


@pytest.fixture(scope="module")
def reader(twins: ModelPair) -> Crosscoder:
    """One latent, active by 2 wherever anything is read: it writes a direction into B that it does
    not into A."""
    d = twins.d_a
    torch.manual_seed(0)
    crosscoder = crosscoder_of([[0.0] * 2 * d], d_a=d)
    crosscoder.W_enc.data = torch.zeros(2 * d, 1)
    crosscoder.b_enc.data = torch.tensor([2.0])
    crosscoder.W_dec.data[0, d:] = 3 * torch.randn(d)
    return crosscoder


@pytest.fixture(scope="module")
def windows(twins: ModelPair) -> list[Segments]:
    return [twins.segments(text)[0].after(twins.bos_segment) for text in TEXTS]


@pytest.fixture(scope="module")
def texts(reader: Crosscoder, twins: ModelPair, windows: list[Segments]) -> Texts:
    """B as if it had been changed: at each paired position its activations hold what the latent
    writes."""
    found = texts_of(reader, twins, 0, windows)
    reading = found.readings["b"]
    acts = found.acts["b"].clone()
    where = reading.context, reading.position
    acts[where] += found.feature_acts[:, None] * reader.W_dec.data[0, twins.d_a :]
    return found._replace(acts={"a": found.acts["a"], "b": acts})


def test_without_its_own_part_the_changed_model_is_the_other_one(
    twins: ModelPair, reader: Crosscoder, texts: Texts
) -> None:
    own = own_part(*both_decoder_differences(reader, None), 0, "b")
    generator = torch.Generator().manual_seed(0)
    drawn: dict[ModelName, Tensor] = {
        "a": torch.randn(6, twins.d_a, generator=generator),
        "b": torch.randn(6, twins.d_b, generator=generator),
    }
    controls: dict[str, dict[ModelName, Tensor]] = {"random": drawn}
    found = verify(twins, texts, own, controls)
    assert found.baseline_js_bits > 5e-4
    for effect in (found.ablated, found.patched):
        # The whole distance goes, text by text.
        assert effect.mean == pytest.approx(found.baseline_js_bits, rel=1e-2)
        assert effect.is_beyond and effect.limits["random"] < 0.9 * effect.mean

    # Without its own part B is A, so that B's predictions move to A's.
    def probabilities(m: ModelName) -> Tensor:
        # Of two copies of one model A's stands for B's.
        found = logits_at_end(twins.a, texts.readings[m].ids, texts.readings[m].mask, texts.acts[m])
        return found.double().softmax(dim=-1)

    distance = jensen_shannon(probabilities("a"), probabilities("b"))
    assert found.used.mean == pytest.approx(distance.mean().item(), rel=1e-2)
    assert found.used.is_beyond and found.used.limits["random"] < 0.9 * found.used.mean
    wrong = verify(twins, texts, ModelSpecificDirection(0, "b", -own.own, -own.moved), controls)
    assert wrong.ablated.mean < 0 and not wrong.ablated.is_beyond
    unread = ModelSpecificDirection(0, "b", 0 * own.own, 0 * own.moved)
    assert verify(twins, texts, unread, controls).used.mean == 0


def test_texts_are_those_at_whose_end_it_fires(
    twins: ModelPair, reader: Crosscoder, windows: list[Segments]
) -> None:
    silent = crosscoder_of(reader.W_dec.data.tolist(), d_a=twins.d_a)
    silent.b_enc.data = torch.tensor([-1.0])
    silent.W_enc.data = torch.zeros_like(reader.W_enc.data)
    assert len(texts_of(reader, twins, 0, windows).rows.contexts) == len(TEXTS)
    none = texts_of(silent, twins, 0, windows)
    assert len(none.rows.contexts) == 0
    with pytest.raises(ValueError, match="fires at the end of none"):
        verify(twins, none, own_part(*both_decoder_differences(silent, None), 0, "b"), {})
    kept = texts_of(silent, twins, 0, windows, fires=False).with_activation(5.0)
    assert kept.at_end.tolist() == [5.0] * len(TEXTS)
    assert kept.feature_acts.sum() == 5.0 * len(TEXTS)


def test_drawn_directions_are_those_that_the_model_uses() -> None:
    rows = torch.randn(200, 5) * torch.tensor([100.0, 1, 1, 1, 1]) + 9
    drawn = drawn_directions(rows, 20, torch.Generator().manual_seed(0))
    along: Tensor = drawn[:, 0].abs() / drawn.norm(dim=1)
    assert along.mean() > 0.95
