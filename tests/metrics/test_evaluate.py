from dataclasses import replace

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluate import HeldOutEvaluator, check_models, evaluate, evaluate_pca
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.stats.jackknife import SE
from tests.helpers import make_acts, make_dfc, train_steps


def test_batches_of_any_size_give_the_same_measures() -> None:
    acts = make_acts(60, 12)
    crosscoder = train_steps(make_dfc(), acts).to_inference()
    whole, *_ = evaluate(crosscoder, [acts])
    parts, *_ = evaluate(crosscoder, [acts[:0], *acts.split(7)])
    assert {k: v for k, v in parts.items() if not k.endswith(SE)} == pytest.approx(whole)
    assert whole["pairs_evaluated"] == 60


def test_an_empty_batch_in_front_changes_no_measure_of_principal_components() -> None:
    acts = make_acts(60, 12)
    crosscoder = make_dfc().to_inference()
    pca = JointPCA.fit([acts], crosscoder.partition, k=3)
    assert evaluate_pca(pca, [acts[:0], acts], crosscoder) == evaluate_pca(pca, [acts], crosscoder)


def test_measures_have_the_names_that_others_rely_on() -> None:
    metrics, *_ = evaluate(make_dfc().to_inference(), [make_acts(20, 12)])
    assert {
        "explained_variance/a",
        "explained_variance/b",
        "l0",
        "l0/shared",
        "l0/a_exclusive",
        "l0/b_exclusive",
        "dead_fraction/shared",
        "dead_fraction/a_exclusive",
        "dead_fraction/b_exclusive",
        "max_forbidden_weight",
        "pairs_evaluated",
    } <= set(metrics)


def test_no_activation_is_an_error_not_a_measure() -> None:
    with pytest.raises(ValueError, match="No pair was evaluated"):
        evaluate(make_dfc().to_inference(), [])


def test_saelens_evaluator_measures_the_form_that_will_be_saved() -> None:
    acts = make_acts(60, 12)
    crosscoder = train_steps(make_dfc(), acts)
    expected, *_ = evaluate(crosscoder.to_inference(), [acts])
    measured = HeldOutEvaluator([acts])(crosscoder, iter([]), ActivationScaler())
    assert measured == {f"held_out/{name}": value for name, value in expected.items()}


def trained_on(pair: ModelPair):  # type: ignore[no-untyped-def]
    crosscoder = make_dfc(d_a=pair.d_a, d_b=pair.d_b)
    for name, value in pair.describe().items():
        crosscoder.cfg.metadata[name] = value
    return crosscoder.to_inference()


def test_the_models_it_was_trained_on_are_accepted(pair: ModelPair) -> None:
    check_models(trained_on(pair), pair)


def test_the_models_in_the_other_order_are_refused(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="trained on another model a: .* in the same order"):
        check_models(trained_on(pair), ModelPair(pair.b, pair.a))


@pytest.mark.slow
def test_another_hook_is_refused_by_name(pair: ModelPair, llama_config: ModelConfig) -> None:
    other = ModelPair.load(
        replace(llama_config, hook_name="blocks.0.hook_resid_post"), llama_config
    )
    with pytest.raises(ValueError, match="hook_name was 'blocks.1.hook_resid_post'"):
        check_models(trained_on(pair), ModelPair(other.a, pair.b))


@pytest.mark.slow
def test_changed_weights_are_refused(llama_config: ModelConfig) -> None:
    crosscoder = trained_on(ModelPair.load(llama_config, llama_config))
    changed = ModelPair.load(llama_config, llama_config)
    with torch.no_grad():
        next(changed.a.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights_sha256 was"):
        check_models(crosscoder, changed)


def test_a_crosscoder_that_does_not_know_its_models_is_refused(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="does not record which models it was trained on"):
        check_models(make_dfc().to_inference(), pair)
