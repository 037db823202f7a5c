"""A crosscoder made by hand of features that are known: what is exclusive is called so, and what
only looks so is not."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from sae_lens_dfc import ToyPair, ToyPairConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate
from sae_lens_dfc.metrics.exclusivity.evidence import (
    MIN_FIRINGS,
    LatentEvidence,
    candidate_latents,
    oriented,
    p_below,
    ranking,
    verdict,
)
from sae_lens_dfc.metrics.exclusivity.known import fit_probes
from sae_lens_dfc.stats.affine_maps import fit_affine_maps
from sae_lens_dfc.stats.jackknife import Estimate
from sae_lens_dfc.stats.moments import PairMoments
from sae_lens_dfc.stats.probe import ProbeOptions

TOY = ToyPairConfig(
    n_features=60,
    d_a=80,
    d_b=90,
    a_exclusive_fraction=0.1,
    b_exclusive_fraction=0.1,
    active_features=6,
    min_magnitude=0.5,
    min_frequency=0.01,
)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
PROBES = ProbeOptions(hidden=32, steps=60, batch=256)
N_SPLIT = 4
"""Shared features that the crosscoder has split in two: one latent for A, one for B."""


@torch.no_grad()
def perfect(pair: ToyPair, n_split: int = 0) -> Crosscoder:
    """Its latents are the features, read by the pseudoinverse; of some shared ones each model has
    its own latent.

    Latents are `[A's own, halves for A | B's own, halves for B | shared]`.
    """
    features, d_a = pair.features, pair.cfg.d_a
    slices = {name: list(range(s.start, s.stop)) for name, s in features.slices.items()}
    split, whole = slices["shared"][:n_split], slices["shared"][n_split:]
    order = [*slices["a_exclusive"], *split, *slices["b_exclusive"], *split, *whole]
    n_a, n_b = len(slices["a_exclusive"]) + n_split, len(slices["b_exclusive"]) + n_split
    cfg = CrosscoderConfig(
        d_in=features.d_in,
        d_sae=len(order),
        d_a=d_a,
        d_b=pair.cfg.d_b,
        n_a_exclusive=n_a,
        n_b_exclusive=n_b,
    )
    crosscoder = Crosscoder(cfg)
    W_dec = pair.directions[order].clone()
    W_enc = torch.cat([_readers(pair.directions[:, m]) for m in features.models.values()])[:, order]
    W_enc[:, n_a + n_b :] /= 2  # a shared latent takes the mean of what both models say
    for inputs, latents in crosscoder.partition.forbidden_blocks():
        W_enc[inputs, latents] = 0
        W_dec[latents, inputs] = 0
    crosscoder.W_enc.copy_(W_enc)
    crosscoder.W_dec.copy_(W_dec)
    crosscoder.threshold.fill_(0.25)
    return crosscoder


def _readers(directions: Tensor) -> Tensor:
    return torch.linalg.pinv(directions)


def measured_on(pair: ToyPair) -> Iterator[Tensor]:
    return islice(pair.batches(500, seed=2), 20)


def measured(crosscoder: Crosscoder, pair: ToyPair) -> tuple[Evaluation, LatentEvidence]:
    to_fit = list(islice(pair.batches(1000, seed=1), 20))
    affine_maps = fit_affine_maps(PairMoments.of(to_fit), pair.cfg.d_a)
    probes = fit_probes(crosscoder, to_fit, PROBES)
    evaluation = evaluate(crosscoder, measured_on(pair), affine_maps, probes)
    assert evaluation.evidence is not None
    return evaluation, evaluation.evidence


@pytest.fixture(scope="module")
def split() -> tuple[Evaluation, LatentEvidence]:
    pair = ToyPair(TOY)
    return measured(perfect(pair, N_SPLIT), pair)


def test_true_features_of_one_model_are_called_and_halves_of_shared_ones_are_not(
    split: tuple[Evaluation, LatentEvidence],
) -> None:
    _, evidence = split
    assert evidence.is_candidate.nonzero()[:, 0].tolist() == list(range(20))
    called = evidence.is_exclusive[:20].tolist()
    assert called == [*[True] * 6, *[False] * 4, *[True] * 6, *[False] * 4]


def test_the_other_model_rebuilds_a_half_and_tells_when_it_fires(
    split: tuple[Evaluation, LatentEvidence],
) -> None:
    _, evidence = split
    halves, own = torch.tensor([6, 7, 8, 9]), torch.arange(6)
    assert (evidence.nu_reconstruction[halves] > 0.7).all()
    assert (evidence.auc[halves] > 0.95).all()
    assert (evidence.nu_reconstruction[own].abs() < 0.3).all()
    assert (evidence.auc[own] < 0.7).all()
    assert (evidence.auc[evidence.groups["shared"]] > 0.9).all()


def test_the_calls_are_counted_by_model(split: tuple[Evaluation, LatentEvidence]) -> None:
    metrics = split[0].metrics
    for group in ("a_exclusive", "b_exclusive"):
        assert metrics[f"exclusive/judged/{group}"] == 10
        assert metrics[f"exclusive/significant/{group}"] == 6
        assert 0.8 < metrics[f"exclusive/power/{group}"] <= 1
    assert metrics["exclusive/significant_share"] == pytest.approx(12 / 64)
    assert metrics["transfer/auc/a_exclusive/p5"] <= metrics["transfer/auc/a_exclusive"]


@pytest.mark.slow
def test_where_every_feature_is_shared_nothing_is_called() -> None:
    shared = replace(TOY, a_exclusive_fraction=0.0, b_exclusive_fraction=0.0)
    pair = ToyPair(shared)
    _, evidence = measured(perfect(pair, n_split=12), pair)
    assert evidence.is_candidate.sum() == 24
    assert not evidence.is_exclusive.any()


@pytest.mark.slow
def test_a_latent_that_hardly_fires_is_not_judged() -> None:
    pair = ToyPair(TOY)
    crosscoder = perfect(pair)
    acts = torch.cat(list(measured_on(pair)))
    # Half of them, as firings are counted to the width of a histogram's bin.
    crosscoder.threshold.data[0] = crosscoder.encode(acts)[:, 0].topk(MIN_FIRINGS // 2).values[-1]
    _, evidence = measured(crosscoder, pair)
    assert evidence.firings[0] < MIN_FIRINGS
    assert evidence.q[0].isnan() and not evidence.is_exclusive[0]
    assert verdict(evidence, 0).startswith("not judged: it fired")


def test_a_verdict_says_what_was_measured(split: tuple[Evaluation, LatentEvidence]) -> None:
    _, evidence = split
    assert verdict(evidence, 0).startswith("exclusive to A, with evidence: B knows ")
    assert verdict(evidence, 6).startswith("not shown to be exclusive: ")
    assert verdict(evidence, 10).startswith("exclusive to B, with evidence")
    assert verdict(evidence, 30).startswith("not a candidate")


def test_the_ranking_has_the_true_ones_first(split: tuple[Evaluation, LatentEvidence]) -> None:
    _, evidence = split
    order = ranking(evidence).tolist()
    assert set(order[:12]) == {*range(6), *range(10, 16)}
    assert set(order[12:20]) == {*range(6, 10), *range(16, 20)}


def test_oriented_measures_are_larger_for_the_true_ones(
    split: tuple[Evaluation, LatentEvidence],
) -> None:
    _, evidence = split
    for name in ("latent_scaling/nu_reconstruction", "transfer/auc", "transfer/r2"):
        values = oriented(evidence)[name]
        assert values[:6].min() > values[6:10].max(), name


@pytest.mark.slow
def test_equal_widths_are_scaled_directly_too_and_the_larger_counts() -> None:
    toy = replace(TOY, d_b=TOY.d_a)
    pair = ToyPair(toy)
    crosscoder = perfect(pair, N_SPLIT)
    _, evidence = measured(crosscoder, pair)
    # The toy models have no common basis: moved as it is a direction says nothing, and the map must
    # decide.
    assert (evidence.nu_reconstruction[torch.tensor([6, 7, 8, 9])] > 0.7).all()


def test_one_sided_decoders_are_candidates_without_a_partition() -> None:
    cfg = CrosscoderConfig(d_in=2, d_sae=4, d_a=1, d_b=1)
    crosscoder = Crosscoder(cfg)
    crosscoder.W_dec.data = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.1, 1.0], [1.0, 0.3]])
    assert candidate_latents(crosscoder).tolist() == [True, False, True, False]


def test_the_p_value_is_that_of_a_one_sided_t_test() -> None:
    def p(value: float, se: float) -> float:
        one = torch.ones(1, dtype=torch.double)
        return p_below(Estimate(value * one, se * one, 9), 0.5).item()

    assert p(0.5, 0.1) == pytest.approx(0.5)  # on the limit
    assert p(0.3, 0.2 / 1.833) == pytest.approx(0.05, abs=1e-3)  # 1.833: t of 9 degrees at 5 %
    assert p(0.8, 0.1) > 0.95
    assert p(float("nan"), 1.0) == 1.0


def test_without_a_standard_error_nothing_is_below() -> None:
    one = torch.ones(1, dtype=torch.double)
    assert p_below(Estimate(0 * one, torch.nan * one, 0), 0.5).item() == 1.0


def superposed(seed: int, n_own: int, n_split: int) -> tuple[LatentEvidence, int]:
    """Models of width 96 with 300 features, read along their directions: the map between them is
    poor.

    `n_own` features are A's alone; `n_split` are of both, and have a latent for each model.
    """
    n, d = 300, 96
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2, n, d, generator=generator), dim=-1)
    directions[1, :n_own] = 0

    def data(n_rows: int) -> Tensor:
        fires = torch.rand(n_rows, n, generator=generator) < 0.006
        acts = fires * (1 + torch.rand(n_rows, n, generator=generator))
        noise = 0.02 * torch.randn(n_rows, 2 * d, generator=generator)
        return torch.cat([acts @ directions[0], acts @ directions[1]], dim=-1) + noise

    n_a, n_b = n_own + n_split, n_split
    latents = [*range(n_a), *range(n_own, n_a), *range(n_a, n)]
    crosscoder = Crosscoder(
        CrosscoderConfig(
            d_in=2 * d, d_sae=len(latents), d_a=d, d_b=d, n_a_exclusive=n_a, n_b_exclusive=n_b
        )
    )
    W_dec = torch.cat([directions[0], directions[1]], dim=-1)[latents]
    for inputs, which in crosscoder.partition.forbidden_blocks():
        W_dec[which, inputs] = 0
    W_enc = W_dec.T.clone()
    W_enc[:, n_a + n_b :] /= 2
    crosscoder.W_dec.data, crosscoder.W_enc.data = W_dec, W_enc
    crosscoder.threshold.data = torch.full((len(latents),), 0.7)
    to_fit = data(20_000)
    affine_maps = fit_affine_maps(PairMoments.of([to_fit]), d)
    probes = fit_probes(crosscoder, [to_fit], ProbeOptions(hidden=64, steps=200, batch=512))
    evidence = evaluate(crosscoder, data(20_000).split(1000), affine_maps, probes).evidence
    assert evidence is not None
    return evidence, n_own


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_in_superposition_no_half_of_a_shared_feature_is_called(seed: int) -> None:
    evidence, _ = superposed(seed, n_own=0, n_split=60)
    assert sum(evidence.groups[f"{m}_exclusive"].sum() for m in "ab") > 100
    assert not evidence.is_exclusive.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_in_superposition_features_of_one_model_are_called(seed: int) -> None:
    evidence, n_own = superposed(seed, n_own=20, n_split=10)
    called = evidence.is_exclusive
    assert called[:n_own].double().mean() >= 0.7
    assert called[n_own:].sum() <= 1


@pytest.mark.slow
def test_of_models_with_nothing_in_common_each_latent_is_called() -> None:
    """No map finds anything here, which must not silence the evidence."""
    pair = ToyPair(replace(TOY, pairing_noise=1.0))
    _, evidence = measured(perfect(pair), pair)
    assert evidence.is_judged.sum() == 12
    assert evidence.is_exclusive[evidence.is_judged].all()
