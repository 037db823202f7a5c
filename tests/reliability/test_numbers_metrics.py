"""Every measure on data that says nothing: it is refused, left out, or what its page says, never a
number that only looks like one."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.analysis.causal.activation_patching import (
    ModelSpecificDirection,
    texts_of,
    verify,
)
from sae_lens_dfc.analysis.causal.behavior import BehaviorOptions, behavior
from sae_lens_dfc.analysis.causal.directions import Directions
from sae_lens_dfc.analysis.causal.judged_behavior import JudgedOptions, judged_behavior
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.latents.cards import _evidence_of
from sae_lens_dfc.analysis.latents.contrast import ContextMaxima, contrast
from sae_lens_dfc.analysis.report.results import drop_nonfinite
from sae_lens_dfc.analysis.report.summary import warnings
from sae_lens_dfc.analysis.steering.latent_acts import explained_by
from sae_lens_dfc.analysis.steering.splicing import loss_and_kl
from sae_lens_dfc.crosscoders.feature_acts_difference import FeatureActsDifference
from sae_lens_dfc.crosscoders.inference import CrosscoderConfig
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.data.activations import RunningMedian
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.cache.norms import NormStatistics
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate, evaluate_pca
from sae_lens_dfc.metrics.exclusivity.decoders import (
    decoder_metrics,
    quantiles,
    relative_decoder_differences,
    relative_decoder_norms,
    relative_difference,
)
from sae_lens_dfc.metrics.exclusivity.known import fit_probes
from sae_lens_dfc.metrics.exclusivity.transfer import Transfer
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance, ReconstructionByRow
from sae_lens_dfc.metrics.sparsity import ActivationStats
from sae_lens_dfc.metrics.stability import stability
from sae_lens_dfc.metrics.token_frequency import ExplainedVarianceByFrequency
from sae_lens_dfc.stats.affine_maps import (
    AffineMaps,
    affine_map_quality,
    fit_affine_maps,
    have_one_basis,
)
from sae_lens_dfc.stats.jackknife import mean_and_error, variation
from sae_lens_dfc.stats.matching_pursuit import explained_by_few
from sae_lens_dfc.stats.moments import PairMoments
from sae_lens_dfc.stats.probe import ProbeOptions
from sae_lens_dfc.stats.significance import Effect, share_beyond
from tests.helpers import make_acts, make_batchtopk, make_firing_dfc

ROWS, D_A, D_B = 40, 5, 7


def rows(kind: str) -> Tensor:
    torch.manual_seed(1)
    x = make_acts(ROWS, D_A + D_B)
    made: dict[str, Callable[[], Tensor]] = {
        "ordinary": lambda: x,
        "alike": lambda: x[:1].expand(ROWS, -1).clone(),
        "alike, 0.1": lambda: torch.full_like(x, 0.1),
        "zero": lambda: torch.zeros_like(x),
        "one row": lambda: x[:1],
        "denormal": lambda: x * 1e-42,
        "1e15": lambda: x * 1e15,
        "1e30": lambda: x * 1e28,
        "3e38": lambda: x.sign() * 3e38,
        "NaN": lambda: x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan)),
        "infinity": lambda: x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.inf)),
    }
    return made[kind]()


VARY = ("ordinary", "denormal", "1e15", "1e30")
DO_NOT_VARY = ("alike", "alike, 0.1", "zero", "one row")
BROKEN = ("3e38", "NaN", "infinity")


@torch.no_grad()
def crosscoder(kind: str) -> Crosscoder:
    torch.manual_seed(0)
    made = make_firing_dfc()
    if kind == "dead":
        made.threshold.fill_(math.inf)
    if kind == "always on":
        made.b_enc.add_(1e4)
    if kind == "always the same":
        made.W_enc.zero_()
        made.b_enc.fill_(1.1)
    if kind == "without a decoder":
        made.W_dec.zero_()
    if kind == "one latent":
        made = make_batchtopk(d_sae=1, k=1).to_inference()
        made.threshold.zero_()
    return made


PROBES = ProbeOptions(hidden=8, steps=20, batch=64)
KINDS = ("alive", "dead", "always on", "always the same", "without a decoder", "one latent")


def ordinary_map() -> AffineMaps:
    torch.manual_seed(2)
    return fit_affine_maps(PairMoments.of([make_acts(200, D_A + D_B)]), D_A)


def measured(of: Crosscoder, acts: Tensor, mapped: bool = True) -> Evaluation:
    if not mapped:
        return evaluate(of, acts.split(4))
    probes = fit_probes(of, [make_acts(200, D_A + D_B)], PROBES)
    # Both models predict what follows equally well.
    following = [torch.ones(len(batch), 2, 2) for batch in acts.split(4)]
    return evaluate(of, acts.split(4), ordinary_map(), probes, following=following)


# --- all measures of a crosscoder ---


@pytest.mark.parametrize("data", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [False, True])
def test_activations_that_are_not_finite_or_overflow_give_no_measure(
    kind: str, data: str, mapped: bool
) -> None:
    if kind in ("always the same", "one latent") and data == "3e38" and not mapped:
        # Nothing overflows where nothing is read: what is finite is measured, and what is not is
        # left out.
        metrics = measured(crosscoder(kind), rows(data), mapped).metrics
        json.dumps(drop_nonfinite(metrics), allow_nan=False)
        return
    message = "NaN or infinit" if data == "3e38" else "Activations to evaluate on hold NaN or inf"
    with pytest.raises(ValueError, match=message):
        measured(crosscoder(kind), rows(data), mapped)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("data", (*VARY, *DO_NOT_VARY))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_called_exclusive_on_data_that_says_nothing(kind: str, data: str) -> None:
    found = measured(crosscoder(kind), rows(data))
    assert found.metrics["exclusive/significant_share"] == 0
    json.dumps(drop_nonfinite(found.metrics), allow_nan=False)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("data", DO_NOT_VARY)
@pytest.mark.parametrize("kind", KINDS)
def test_of_what_does_not_vary_no_share_of_the_variance_is_explained(kind: str, data: str) -> None:
    """Not 1, not 0, and not the -1e30 that rounding would make of it: no number."""
    metrics = measured(crosscoder(kind), rows(data)).metrics
    shares = [
        n for n in metrics if n.startswith(("explained_variance", "cross_rec", "affine_map/"))
    ]
    assert len(shares) >= 12
    assert not any(math.isfinite(metrics[name]) for name in shares)


@pytest.mark.parametrize("data", VARY)
def test_of_a_dead_crosscoder_it_is_said_that_nothing_fires_and_nothing_is_told_of_its_latents(
    data: str,
) -> None:
    metrics = drop_nonfinite(measured(crosscoder("dead"), rows(data)).metrics)
    assert metrics["l0"] == 0 and metrics["dead_fraction/shared"] == 1
    assert measured(crosscoder("dead"), rows(data), mapped=False).metrics["cosine/a"] == 0
    assert not [n for n in metrics if n.startswith(("latent_scaling", "transfer"))]
    assert metrics["exclusive/judged/a_exclusive"] == 0
    assert "No latent fires" in "".join(warnings(metrics))


def test_latents_that_are_always_the_same_have_no_scaling_and_no_auc() -> None:
    """Both are quotients of what rounding leaves of equal numbers."""
    found = measured(crosscoder("always the same"), rows("ordinary"))
    assert found.metrics["l0"] == 24
    assert not [n for n in found.metrics if n.startswith(("latent_scaling", "transfer/auc"))]
    assert found.evidence is not None and found.evidence.nu_error.isnan().all()
    assert found.evidence.r2.isnan().all()


@pytest.mark.parametrize("factor", [1e-15, 1e12])
def test_the_size_of_activations_that_were_trained_on_changes_no_measure(factor: float) -> None:
    acts = rows("ordinary")
    trained = make_batchtopk()
    torch.manual_seed(3)
    trained.W_enc.data.normal_()

    def of(x: Tensor) -> dict[str, float]:
        trained.fit_normalization(x)
        trained.topk_threshold.fill_(0.5)
        affine_maps = fit_affine_maps(PairMoments.of([x]), D_A)
        saved = trained.to_inference()
        probes = fit_probes(saved, [x], PROBES)
        return drop_nonfinite(evaluate(saved, x.split(4), affine_maps, probes).metrics)

    plain, scaled = of(acts), of(acts * factor)
    assert plain.keys() == scaled.keys()
    for name in plain:
        if not name.endswith(("/se", "/p5", "/p95")):
            assert scaled[name] == pytest.approx(plain[name], rel=0.02, abs=0.02), name


def test_what_is_left_out_of_the_measures_is_named(caplog: pytest.LogCaptureFixture) -> None:
    values = {f"m{i}": math.nan for i in range(20)} | {"x": 1.0, "y": math.inf, "x/se": math.nan}
    assert drop_nonfinite(values) == {"x": 1.0}
    assert "m0, m1" in caplog.text and "and 9 more" in caplog.text and "x/se" not in caplog.text


# --- one measure at a time ---

ONE = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=2)
CONSTANT = torch.tensor([[0.1, 3.0]]).expand(7, -1)


def test_of_what_does_not_vary_even_a_perfect_reconstruction_explains_nothing() -> None:
    variance = ExplainedVariance(ONE)
    variance.update(CONSTANT, CONSTANT)
    assert all(math.isnan(x) for x in variance.compute().values())
    of_one = torch.zeros(7, dtype=torch.long)
    for rebuilt in (CONSTANT, CONSTANT + 1):
        by_frequency = ExplainedVarianceByFrequency(ONE, torch.zeros(2))
        by_frequency.update(CONSTANT, rebuilt, {"a": of_one, "b": of_one})
        assert by_frequency.compute() == {}


def test_a_reconstruction_that_is_nan_explains_nothing() -> None:
    acts, broken = torch.randn(9, 2), torch.full((9, 2), math.nan)
    variance = ExplainedVariance(ONE)
    variance.update(acts, broken)
    by_row = ReconstructionByRow(ONE, torch.zeros(2), torch.ones(2))
    by_row.update(acts, broken)
    assert all(math.isnan(x) for x in (variance.compute() | by_row.compute()).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_no_numbers_are_not_counted_as_silence(value: float) -> None:
    acts = torch.tensor([[value, 0.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="1 of 2 latents have activations that are NaN or inf"):
        ActivationStats(ONE).update(acts)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ContextMaxima(2).update(acts, torch.tensor([0, 1]))
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        FeatureActsDifference({"all": slice(0, 2)}, torch.zeros(1)).update(x, acts, acts, x, x)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        crosscoder("alive").export_sae("a", rows=[rows("NaN")])


def test_what_a_card_says_of_a_latent_is_numbers() -> None:
    evidence = measured(crosscoder("alive"), rows("ordinary")).evidence
    assert evidence is not None
    broken = evidence._replace(
        nu_error=torch.full((24,), math.inf), nu_reconstruction=torch.full((24,), math.nan)
    )
    said = _evidence_of(broken, 12)
    assert "auc" in said and "nu_error" not in said and "nu_reconstruction" not in said


def test_an_export_of_a_dead_crosscoder_says_that_nothing_fires() -> None:
    sae = crosscoder("dead").export_sae("b", rows=rows("ordinary").split(4))
    said: dict[str, float] = sae.cfg.metadata.get("difference_to_crosscoder")
    assert said["l0/crosscoder"] == said["l0/exported"] == 0
    assert not [name for name in said if name.startswith(("code_explained", "firing_"))]
    json.dumps(said, allow_nan=False)


@pytest.mark.parametrize("data", [*DO_NOT_VARY, "NaN", "infinity"])
def test_no_map_and_no_components_are_made_of_activations_that_do_not_vary(data: str) -> None:
    moments = PairMoments.of(rows(data).split(4))
    with pytest.raises(ValueError, match="No map between the models: .* variance of model A"):
        fit_affine_maps(moments, D_A)
    partition = Partition(D_A, D_B, 0, 0, 2)
    with pytest.raises(ValueError, match="No principal components: .* variance of model A"):
        JointPCA.fit(rows(data).split(4), partition, 2)
    square = PairMoments.of([rows(data)[:, :4]])
    assert not have_one_basis(square, 2)


@pytest.mark.parametrize("factor", [1e-40, 1.0, 1e30])
def test_a_map_is_that_of_the_numbers_whatever_their_size(factor: float) -> None:
    x = torch.randn(50, 1)
    moments = PairMoments.of([torch.cat([x, 2 * x], dim=1) * factor])
    affine_maps = fit_affine_maps(moments, 1)
    assert affine_maps.a_to_b.item() == pytest.approx(2, rel=1e-3)
    assert affine_map_quality(affine_maps, moments)["affine_map/a_to_b"] == pytest.approx(
        1, abs=1e-3
    )


def test_a_map_beyond_float32_is_refused() -> None:
    x = torch.randn(50, 1)
    with pytest.raises(ValueError, match="overflows float32"):
        fit_affine_maps(PairMoments.of([torch.cat([x * 1e30, x * 1e-30], dim=1)]), 1)


def test_more_components_than_dimensions_are_all_of_them() -> None:
    acts = torch.randn(60, 2)
    found = evaluate_pca(JointPCA.fit([acts], ONE, k=5), [acts], crosscoder_of_width_one())
    assert found["l0"] == 2 and found["explained_variance/a"] == pytest.approx(1)


def crosscoder_of_width_one() -> Crosscoder:
    return Crosscoder(CrosscoderConfig(d_in=2, d_sae=2, d_a=1, d_b=1))


def test_of_a_latent_without_a_decoder_it_is_not_said_that_it_is_one_models() -> None:
    """0 / 0 is not B's alone."""
    empty = crosscoder("without a decoder")
    assert (relative_decoder_norms(empty) == 0.5).all()
    said = decoder_metrics(empty)
    assert (
        said["relative_decoder_norm/one_sided_a"] == said["relative_decoder_norm/one_sided_b"] == 0
    )
    assert stability(empty, empty)["stability/matched/shared"] == 0


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15])
def test_how_far_decoders_differ_does_not_depend_on_their_size(size: float) -> None:
    x, y = torch.tensor([[size, 0.0], [size, 0.0]]), torch.tensor([[0.0, 0.0], [size, 0.0]])
    if size == 1e-30:
        assert (relative_difference(x, y) == 0).all()  # their squares are 0
        return
    assert relative_difference(x, y).tolist() == [1.0, 0.0]
    one_basis = Crosscoder(CrosscoderConfig(d_in=4, d_sae=2, d_a=2, d_b=2))
    one_basis.W_dec.data = torch.cat([x, y], dim=1)
    assert relative_decoder_differences(one_basis).tolist() == [1.0, 0.0]


def test_a_direction_is_not_explained_by_itself_where_there_is_no_other() -> None:
    own, itself = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    assert explained_by_few(own, own, itself).item() == pytest.approx(0, abs=1e-6)
    assert explained_by_few(own, torch.zeros(3, 2)).item() == pytest.approx(0, abs=1e-6)
    assert explained_by_few(own, torch.zeros(0, 2)).item() == pytest.approx(0, abs=1e-6)
    assert explained_by_few(0 * own, torch.eye(2)).isnan().all()
    assert explained_by_few(math.nan * own, torch.eye(2)).isnan().all()


def test_what_cannot_be_said_in_either_reading_adds_no_divergence() -> None:
    """A logit of minus infinity, as of a token that is forbidden, is a probability of 0."""
    forbidden = torch.tensor([[-math.inf, 0.0, 1.0]])
    loss, kl = loss_and_kl(forbidden, torch.tensor([[-math.inf, 0.0, 0.0]]), torch.tensor([1]))
    expected = torch.log(torch.tensor(1 + math.e)) - torch.log(torch.tensor(2.0)) - 0.5
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5) and loss.isfinite().all()
    assert loss_and_kl(forbidden, torch.zeros(1, 3), torch.tensor([1]))[1].item() == math.inf
    for broken in (math.nan, math.inf):
        untouched = torch.tensor([[broken, 0.0, 0.0]])
        assert loss_and_kl(torch.zeros(1, 3), untouched, torch.tensor([1]))[1].isnan().all()


def test_logits_that_overflow_have_no_probabilities() -> None:
    two = Outcomes(torch.tensor([0]), torch.tensor([0]), 2)
    for logits in ([math.inf, 0.0], [math.nan, 0.0], [-math.inf, -math.inf]):
        found = outcome_probabilities(torch.tensor(logits), two)
        assert found.isnan().all()
        assert jensen_shannon(found, torch.tensor([0.5, 0.5]).double()).isnan()


def test_a_mean_of_what_is_no_number_is_none() -> None:
    assert mean_and_error("x", [1.0, 1.0]) == {"x": 1.0, "x/se": 0.0}
    for broken in (math.nan, math.inf):
        found = mean_and_error("x", [broken, 1.0])
        assert not any(math.isfinite(x) for x in found.values())
    assert math.isnan(mean_and_error("x", [math.inf, -math.inf])["x"])


def test_an_effect_that_is_no_number_is_beyond_no_control() -> None:
    controls = {"random": torch.zeros(2, 3)}
    for values in ([math.nan, 1.0, 2.0], [math.nan] * 3):
        effect = Effect(torch.tensor(values), controls)
        assert not effect.is_beyond and not effect.p < 1
    beside_broken = Effect(torch.ones(3), {"random": torch.tensor([[math.nan, 0.0, 0.0]] * 2)})
    assert not beside_broken.is_beyond


def test_corpora_in_which_a_latent_is_always_the_same_are_told_apart_or_not_by_its_value() -> None:
    def of(one: list[float], other: list[float]) -> tuple[float, float]:
        maxima = ContextMaxima(1), ContextMaxima(1)
        for corpus, values in zip(maxima, (one, other), strict=True):
            corpus.update(torch.tensor(values)[:, None], torch.arange(len(values)))
        found = contrast(*maxima)
        return found.cohens_d.item(), found.auroc.item()

    assert of([0.1, 0.1, 0.1], [0.1, 0.1]) == (0, 0.5)
    assert of([0.0, 0.0], [0.0, 0.0]) == (0, 0.5)
    assert of([0.5, 0.5], [0.25, 0.25]) == (math.inf, 1)
    assert of([1e30, 2e30], [1.0, 2.0])[1] == 1


def test_a_guess_of_a_latent_that_is_always_the_same_explains_nothing_of_it() -> None:
    same = crosscoder("always the same")
    for value in (0.1, 0.7, 1.1, 3.3, 1e3):
        same.b_enc.data.fill_(value)
        shares = explained_by(same, "a", [12, 13], torch.zeros(D_B), rows("ordinary").split(4))
        assert shares.isnan().all()
    assert explained_by(crosscoder("dead"), "a", [12], torch.zeros(D_B), [rows("ordinary")]).isnan()


def test_transfer_has_no_figure_for_a_latent_that_fires_always_or_never() -> None:
    for kind in ("dead", "always the same"):
        of = crosscoder(kind)
        transfer = Transfer(of, ordinary_map())
        acts = rows("ordinary")
        transfer.calibrate(acts, of.encode(acts))
        transfer.update(acts)
        found = transfer.compute()
        assert found["auc"].isnan().all() and found["r2"].isnan().all()


def test_norms_that_are_no_numbers_are_refused_and_zeros_are_not() -> None:
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="norm"):
            NormStatistics().update(torch.tensor([1.0, broken]))
    zeros = NormStatistics()
    zeros.update(torch.zeros(3))
    assert (zeros.mean, zeros.std) == (0, 0)


# --- models that overflow ---

TEXTS = ["The cat sat on the mat.", "In 1989 the cat sat", "The mat is on the cat", "A cat, a mat"]


def windows(pair: ModelPair) -> list[Segments]:
    return [pair.segments(text)[0].after(pair.bos_segment) for text in TEXTS]


def always_firing(pair: ModelPair) -> Crosscoder:
    made = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    made.b_enc.data.fill_(1e3)
    return made


def test_texts_in_which_a_model_overflows_are_left_out_of_a_causal_test(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the text: all that the model says after is no number."""
    token = int(windows(pair)[3].ids_a[1])  # the first of the last text, and in no other
    read = pair.a.activations

    def overflowing(ids: Tensor, mask: Tensor) -> Tensor:
        return read(ids, mask).masked_fill((ids == token)[..., None], math.inf)

    crosscoder = always_firing(pair)
    kept = texts_of(crosscoder, pair, 12, windows(pair))
    monkeypatch.setattr(pair.a, "activations", overflowing)
    finite = texts_of(crosscoder, pair, 12, windows(pair))
    assert [c.number for c in kept.rows.contexts] == [0, 1, 2, 3]
    assert [c.number for c in finite.rows.contexts] == [0, 1, 2]
    assert torch.equal(finite.at_end, kept.at_end[:3])
    assert all(acts.isfinite().all() for acts in finite.acts.values())
    none = texts_of(crosscoder, pair, 12, windows(pair)[3:])
    assert not none.rows.contexts and len(none.feature_acts) == 0


def test_a_change_that_makes_a_model_overflow_has_no_effect_to_be_believed(
    pair: ModelPair,
) -> None:
    texts = texts_of(always_firing(pair), pair, 12, windows(pair))
    huge = ModelSpecificDirection(12, "a", torch.full((pair.d_a,), 1e38), torch.ones(pair.d_b))
    with pytest.raises(
        ValueError, match="Model A's next-token probabilities are NaN when it is ch"
    ):
        verify(pair, texts, huge, {})


def test_a_latent_of_which_a_judge_gave_no_number_is_in_no_mean(pair: ModelPair) -> None:
    directions = {1: Directions(torch.ones(pair.d_a), torch.ones(pair.d_b))}
    options = JudgedOptions(strengths=(2.0,), n_random=1, max_new_tokens=2)
    found = judged_behavior(pair, directions, {1: "shared"}, lambda _: "I cannot say.", options)
    assert found.metrics == {"behavior/judged/without_number": 1.0}
    assert math.isnan(found.scores[1])


def test_steering_that_overflows_is_not_said_to_be_followed(pair: ModelPair) -> None:
    directions = {
        1: Directions(torch.full((pair.d_a,), 3e38), torch.ones(pair.d_b)),
        2: Directions(torch.ones(pair.d_a), torch.ones(pair.d_b)),
    }
    options = BehaviorOptions(strengths=(2.0,), n_continuation=0, n_random=0)
    found = behavior(pair, directions, {1: "a_exclusive", 2: "shared"}, options)
    assert math.isnan(found.latents[1].score) and math.isfinite(found.latents[2].score)
    assert "behavior/shared" in drop_nonfinite(found.metrics)
    assert "behavior/a_exclusive" not in drop_nonfinite(found.metrics)


# --- any numbers at all ---

NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)
FEW = st.integers(0, 6).flatmap(lambda n: arrays("float32", n, elements=NUMBERS))
SOME = st.integers(1, 6).flatmap(lambda n: arrays("float32", n, elements=NUMBERS))


@settings(max_examples=80)
@given(values=FEW, reference=FEW)
def test_a_share_beyond_any_numbers_is_a_share(values: Any, reference: Any) -> None:
    share = share_beyond(torch.from_numpy(values), torch.from_numpy(reference))
    assert math.isnan(share) or 0 <= share <= 1


@settings(max_examples=80)
@given(values=SOME)
def test_quantiles_and_medians_of_any_numbers_are_of_those_that_are_numbers(values: Any) -> None:
    x = torch.from_numpy(values)
    found = quantiles("x", x)
    assert (found == {}) == bool(x.isnan().all())
    if x.isfinite().all():
        lowest, highest = x.min().double().item(), x.max().double().item()
        slack = 1e-6 * max(abs(lowest), abs(highest))
        assert all(lowest - slack <= q <= highest + slack for q in found.values())
        median = RunningMedian()
        median.update(x.abs())
        assert lowest == highest or median.compute() in x.abs().tolist()


@settings(max_examples=80)
@given(values=SOME)
def test_a_variation_is_never_negative_and_0_of_equal_numbers(values: Any) -> None:
    x = torch.from_numpy(values).double()
    found = variation(len(x), x.sum(), x.pow(2).sum()).item()
    assert found >= 0 or not x.isfinite().all() or math.isnan(found)
    same = x[:1].expand(7)
    if same.isfinite().all():
        assert variation(7, same.sum(), same.pow(2).sum()).item() == 0


@settings(max_examples=80)
@given(values=arrays("float32", (2, 4), elements=NUMBERS))
def test_a_divergence_of_any_logits_is_a_share_or_no_number(values: Any) -> None:
    every = Outcomes(torch.arange(3), torch.arange(3), 4)
    p, q = (outcome_probabilities(torch.from_numpy(x), every) for x in values)
    found = jensen_shannon(p, q).item()
    assert math.isnan(found) or 0 <= found <= 1
    if math.isnan(found):
        assert p.isnan().any() or q.isnan().any()


@settings(max_examples=60, deadline=None)
@given(
    acts=arrays("float32", (12, 2), elements=NUMBERS),
    rebuilt=arrays("float32", (12, 2), elements=NUMBERS),
)
def test_explained_variance_of_any_numbers_is_at_most_1_or_no_number(
    acts: Any, rebuilt: Any
) -> None:
    variance = ExplainedVariance(ONE)
    for x, y in zip(
        torch.from_numpy(acts).split(3), torch.from_numpy(rebuilt).split(3), strict=True
    ):
        variance.update(x, y)
    found = variance.compute()
    for name in ("explained_variance/a", "explained_variance/b"):
        assert not found[name] > 1 + 1e-9
        column = 0 if name.endswith("a") else 1
        if not torch.from_numpy(acts)[:, column].isfinite().all():
            assert not math.isfinite(found[name])
