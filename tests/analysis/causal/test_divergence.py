"""Divergence explained, on a pair whose difference is one latent's: a model, and it with a direction
added to its activations at every paired position."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.causal import common_predictions
from sae_lens_dfc.analysis.causal.attribution import attribution
from sae_lens_dfc.analysis.causal.common_predictions import ModelDifference, paired_texts
from sae_lens_dfc.analysis.causal.divergence import SIZES, Orders, divergence_explained
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.screening.causal_tests import Subject, subject_of
from sae_lens_dfc.analysis.screening.explained_divergence import explained_divergence
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.moments import PairMoments

TEXTS = ["The cat sat on the mat.", "In 1989 the cat sat", "The mat is on the cat", "A cat, a mat"]
N_LATENTS = 25
"""More than the largest number of latents whose changes are made together."""


@pytest.fixture(scope="module")
def twins(llama_config: ModelConfig) -> ModelPair:
    """Two copies of one model, of which the second embeds every token but the first as a direction
    more."""
    config = replace(llama_config, hook_name="blocks.0.hook_resid_pre")
    pair = ModelPair(load_model(config), load_model(config))
    embedding = pair.b.model.embed.W_E.data
    bos = int(pair.bos_segment.ids_b[0])
    embedding[torch.arange(len(embedding)) != bos] += direction(pair)
    return pair


def direction(pair: ModelPair) -> Tensor:
    return 0.2 * torch.randn(pair.d_a, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def crosscoder(twins: ModelPair) -> Crosscoder:
    """The last latent is active by 2 everywhere and writes the direction into B alone; the others
    write the same into both."""
    d = twins.d_a
    cfg = CrosscoderConfig(d_in=2 * d, d_sae=N_LATENTS, d_a=d, d_b=d)
    made = Crosscoder(cfg)
    same = torch.randn(N_LATENTS, d, generator=torch.Generator().manual_seed(1))
    made.W_enc.data = torch.zeros(2 * d, N_LATENTS)
    made.b_enc.data = torch.full((N_LATENTS,), 2.0)
    made.W_dec.data = torch.cat([same, same], dim=1)
    made.W_dec.data[-1] = torch.cat([torch.zeros(d), direction(twins) / 2])
    return made


@pytest.fixture(scope="module")
def rows(twins: ModelPair) -> list[PairedRows]:
    read = [twins.segments(text)[0].after(twins.bos_segment) for text in TEXTS]
    batches: list[PairedRows] = []
    for i, text in enumerate(read):
        contexts = [Context(text, i, i)]
        [found] = paired_activations(
            twins, [ContextBatch(contexts, {})], PairCounts(), outlier_factor=float("inf")
        )
        batches.append(found._replace(contexts=contexts))
    return batches


@pytest.fixture(scope="module")
def moments(rows: list[PairedRows]) -> PairMoments:
    return PairMoments.of(one.acts for one in rows)


@pytest.fixture(scope="module")
def on(crosscoder: Crosscoder, twins: ModelPair) -> ModelDifference:
    return difference_of(crosscoder, twins)


def difference_of(
    crosscoder: Crosscoder, pair: ModelPair, affine_maps: AffineMaps | None = None
) -> ModelDifference:
    of_a, of_b = both_decoder_differences(crosscoder, affine_maps)
    return ModelDifference(crosscoder, pair, {"a": of_a, "b": of_b}, affine_maps)


def for_both(**orders: list[int]) -> Orders:
    return {name: {"a": order, "b": order} for name, order in orders.items()}


def test_what_makes_the_difference_explains_all_of_it_and_random_directions_do_not(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    orders = for_both(first=[N_LATENTS - 1, *range(N_LATENTS - 1)], last=list(range(N_LATENTS)))
    found = divergence_explained(on, rows, orders, moments)
    assert found["divergence/bits"] > 5e-4
    assert found["divergence/pairs"] == sum(len(one.acts) for one in rows)
    for m in ("a", "b"):
        whole = ["mean", "full_difference", "latents", "latents_and_bias"]
        whole += [f"{kind}/{n}" for kind in ("first", "components") for n in SIZES]
        for name in whole:
            assert found[f"divergence/{m}/{name}"] == pytest.approx(1, abs=1e-2), name
            assert found[f"divergence/{m}/{name}/se"] < 1e-2
        assert all(found[f"divergence/{m}/random_first/{n}"] < 0.5 for n in SIZES)
        # Latents that both models have alike.
        nothing = [
            found[f"divergence/{m}/{kind}/{n}"] for kind in ("last", "random_last") for n in SIZES
        ]
        assert nothing == pytest.approx([0] * len(nothing))


def test_where_the_full_difference_explains_nothing_nothing_else_is_measured(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    d = on.crosscoder.cfg.d_a
    mean = moments.mean.float()
    wrong = AffineMaps(mean[:d] + 3, mean[d:] - 3, torch.zeros(d, d), torch.zeros(d, d))
    found = divergence_explained(
        difference_of(on.crosscoder, on.pair, wrong), rows, for_both(any=[0]), moments
    )
    assert found["divergence/b/full_difference"] < 0
    assert {name.removesuffix("/se") for name in found} == {
        "divergence/bits",
        "divergence/pairs",
        "divergence/a/full_difference",
        "divergence/b/full_difference",
    }


def test_with_a_map_that_holds_the_difference_is_what_the_map_makes_of_the_other_model(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    """The map adds the direction, so that mapped activations are the other model's."""
    d = on.crosscoder.cfg.d_a
    mean = moments.mean.float()
    exact = AffineMaps(mean[:d], mean[d:], torch.eye(d), torch.eye(d))
    found = divergence_explained(
        difference_of(on.crosscoder, on.pair, exact), rows, for_both(one=[N_LATENTS - 1]), moments
    )
    # What B's map to A makes of B is A's activation, without the difference of their means.
    assert found["divergence/b/full_difference"] == pytest.approx(0, abs=1e-3)
    assert "divergence/b/mean" not in found


def test_two_equal_models_have_no_divergence_to_explain(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    same = replace(on, pair=ModelPair(on.pair.a, on.pair.a))
    found = divergence_explained(same, rows, for_both(any=[0]), moments)
    assert found["divergence/bits"] == 0
    assert math.isnan(found["divergence/a/full_difference"])


@pytest.mark.parametrize("n", [1, 5])
def test_a_few_rows_of_a_large_vocabulary_stand_for_all(
    on: ModelDifference, rows: list[PairedRows], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_vocab = int(on.pair.a.model.cfg.d_vocab)
    outcomes = dict(zip(on.pair.models, common_outcomes(on.pair.a, on.pair.b), strict=True))
    [whole] = paired_texts(on.pair, rows[0], outcomes)
    monkeypatch.setattr(common_predictions, "MAX_LOGITS", n * d_vocab)
    [part] = paired_texts(on.pair, rows[0], outcomes)
    assert len(part.compared) == n < len(whole.compared)
    torch.testing.assert_close(part.predictions("b"), whole.predictions("b")[part.compared])


def test_the_divergence_is_that_of_the_models_own_predictions(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    found = divergence_explained(on, rows, for_both(any=[0]), moments)
    per_pair: list[Tensor] = []
    outcomes = common_outcomes(on.pair.a, on.pair.b)
    for one in rows:
        [context] = one.contexts
        ids = torch.from_numpy(context.segments.ids_a)[None]
        p, q = (
            outcome_probabilities(model.model(ids, return_type="logits")[0], of_model)
            for model, of_model in zip(on.pair.models.values(), outcomes, strict=True)
        )
        per_pair.append(
            jensen_shannon(p, q)[torch.from_numpy(context.segments.last_a)[one.segment]]
        )
    assert found["divergence/bits"] == pytest.approx(torch.cat(per_pair).mean().item(), rel=1e-3)


def test_attribution_is_the_slope_of_the_divergence(
    on: ModelDifference, rows: list[PairedRows], moments: PairMoments
) -> None:
    found = attribution(on, rows)
    # A hundredth of the change explains a hundredth of the slope.
    part = Crosscoder(on.crosscoder.cfg)
    part.load_state_dict(on.crosscoder.state_dict())
    part.W_dec.data[-1] *= 0.01
    of_part = difference_of(part, on.pair)
    explained = divergence_explained(of_part, rows, for_both(one=[N_LATENTS - 1]), moments)
    for m, slope in found.items():
        assert slope[:-1].abs().max() == 0
        expected = 100 * explained["divergence/bits"] * explained[f"divergence/{m}/one/1"]
        assert slope[-1].item() == pytest.approx(expected, rel=0.05)


# --- in a screening ---


def subject(on: ModelDifference, rows: list[PairedRows]) -> Subject:
    contexts = [context for one in rows for context in one.contexts]
    return subject_of(on.crosscoder, on.pair, PairData(rows, rows, contexts, {}))


def test_a_screening_explains_the_divergence_by_the_latent_that_makes_it(
    on: ModelDifference, rows: list[PairedRows]
) -> None:
    first = [N_LATENTS - 1, *range(N_LATENTS - 1)]
    found = explained_divergence(subject(on, rows), first, 1000, seed=0)
    last = explained_divergence(subject(on, rows), first[::-1], 1000, seed=0)
    for m in ("a", "b"):
        assert found[f"divergence/{m}/by_evidence/1"] == pytest.approx(1, abs=1e-2)
        assert last[f"divergence/{m}/by_evidence/20"] == pytest.approx(0, abs=1e-6)
        # The gradient finds it in whichever place it stands.
        assert last[f"divergence/{m}/by_gradient/1"] == pytest.approx(1, abs=1e-2)


def test_nothing_is_explained_without_pairs_or_without_text_for_the_gradient(
    on: ModelDifference, rows: list[PairedRows], caplog: pytest.LogCaptureFixture
) -> None:
    assert explained_divergence(subject(on, rows), [0], 0, seed=0) == {}
    assert caplog.text == ""
    assert explained_divergence(subject(on, rows[:1]), [0], 1000, seed=0) == {}
    assert "the held-out text is one batch" in caplog.text
