"""Divergence explained, on a pair whose difference is one latent's: a model, and it with a direction
added to its activations at every paired position."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.causal.attribution import attribution
from sae_lens_dfc.analysis.causal.divergence import (
    SIZES,
    Explaining,
    divergence_explained,
)
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair
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
def on(crosscoder: Crosscoder, twins: ModelPair, moments: PairMoments) -> Explaining:
    return Explaining(crosscoder, twins, moments, None)


def test_what_makes_the_difference_explains_all_of_it_and_random_directions_do_not(
    on: Explaining, rows: list[PairedRows]
) -> None:
    orders = {"first": [N_LATENTS - 1, *range(N_LATENTS - 1)], "last": list(range(N_LATENTS))}
    found = divergence_explained(on, rows, orders)
    assert found["divergence/bits"] > 5e-4
    for m in ("a", "b"):
        whole = ["mean", "everything", "latents"]
        whole += [f"{kind}/{n}" for kind in ("first", "components") for n in SIZES]
        for name in whole:
            assert found[f"divergence/{m}/{name}"] == pytest.approx(1, abs=1e-2), name
            assert found[f"divergence/{m}/{name}/se"] < 1e-2
        assert all(found[f"divergence/{m}/random/{n}"] < 0.8 for n in SIZES)
        # Latents that both models have alike.
        assert [found[f"divergence/{m}/last/{n}"] for n in SIZES] == pytest.approx([0, 0, 0])


def test_where_the_whole_difference_explains_nothing_nothing_else_is_measured(
    on: Explaining, rows: list[PairedRows]
) -> None:
    d = on.crosscoder.cfg.d_a
    mean = on.moments.mean.float()
    wrong = AffineMaps(mean[:d] + 3, mean[d:] - 3, torch.zeros(d, d), torch.zeros(d, d))
    found = divergence_explained(replace(on, affine_maps=wrong), rows, {"any": [0]})
    assert found["divergence/b/everything"] < 0
    assert {name.removesuffix("/se") for name in found} == {
        "divergence/bits",
        "divergence/a/everything",
        "divergence/b/everything",
    }


def test_the_divergence_is_that_of_the_models_own_predictions(
    on: Explaining, rows: list[PairedRows]
) -> None:
    found = divergence_explained(on, rows, {"any": [0]})
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


def test_attribution_is_the_slope_of_the_divergence(on: Explaining, rows: list[PairedRows]) -> None:
    found = attribution(on.crosscoder, on.pair, rows, None)
    assert found[:-1].abs().max() == 0
    # A hundredth of the change explains a hundredth of the slope.
    part = Crosscoder(on.crosscoder.cfg)
    part.load_state_dict(on.crosscoder.state_dict())
    part.W_dec.data[-1] *= 0.01
    of_part = replace(on, crosscoder=part)
    explained = divergence_explained(of_part, rows, {"one": [N_LATENTS - 1]})
    of_both = [explained[f"divergence/{m}/one/1"] for m in ("a", "b")]
    slope = 100 * explained["divergence/bits"] * sum(of_both) / 2
    assert found[-1].item() == pytest.approx(slope, rel=0.05)
    assert attribution(part, on.pair, rows, None)[-1].item() == pytest.approx(
        found[-1].item() / 100, rel=1e-3
    )
