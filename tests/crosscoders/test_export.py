import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_dfc import (
    Crosscoder,
    CrosscoderConfig,
    CrosscoderSAETrainer,
    DFCTrainingCrosscoder,
    ModelConfig,
    ModelPair,
    ToyPair,
    ToyPairConfig,
)
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.stats.affine_maps import AffineMaps, fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments
from tests.helpers import dfc_config, make_acts, make_firing_dfc, make_standard, sae_trainer_config
from tests.model_classes import HAS_HOOKED_TRANSFORMER, needs_hooked_transformer

MODELS: tuple[Literal["a", "b"], ...] = ("a", "b")
TEXT = "The cat sat on the mat in 1989. It was a dark and stormy night, and so on."


def linear_map(d_a: int = 5, d_b: int = 7) -> AffineMaps:
    return AffineMaps(
        torch.randn(d_a), torch.randn(d_b), torch.randn(d_a, d_b), torch.randn(d_b, d_a)
    )


def difference(sae: SAE[Any]) -> dict[str, float]:
    return sae.cfg.metadata.get("difference_to_crosscoder")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Literal["a", "b"]:
    return request.param


@pytest.fixture(params=[False, True], ids=["mean", "map"])
def affine_maps(request: pytest.FixtureRequest) -> AffineMaps | None:
    return linear_map() if request.param else None


def test_its_own_exclusive_latents_have_the_crosscoders_code(
    model: Literal["a", "b"], affine_maps: AffineMaps | None
) -> None:
    crosscoder, acts = make_firing_dfc(), make_acts(500, 12)
    own = crosscoder.partition.slices[f"{model}_exclusive"]
    sae = crosscoder.export_sae(model, affine_maps)
    code = sae.encode(acts[:, crosscoder.partition.models[model]])[:, : own.stop - own.start]
    expected = crosscoder.encode(acts)[:, own]
    assert (expected > 0).float().mean() > 0.01
    torch.testing.assert_close(code, expected, rtol=1e-4, atol=1e-3)
    weights = crosscoder.W_enc[crosscoder.partition.models[model], own]
    assert torch.equal(sae.W_enc[:, : own.stop - own.start], weights)


def test_where_the_map_is_right_shared_latents_have_the_crosscoders_code_too(
    model: Literal["a", "b"],
) -> None:
    crosscoder, affine_maps, acts = make_firing_dfc(), linear_map(), make_acts(500, 12)
    if model == "a":
        acts[:, 5:] = affine_maps.to_b(acts[:, :5])
    else:
        acts[:, :5] = affine_maps.to_a(acts[:, 5:])
    sae = crosscoder.export_sae(model, affine_maps, [acts])
    inputs = crosscoder.partition.models[model]
    expected = crosscoder.encode(acts)[:, sae.cfg.metadata.latents]
    torch.testing.assert_close(sae.encode(acts[:, inputs]), expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        sae(acts[:, inputs]), crosscoder(acts)[:, inputs], rtol=1e-3, atol=1e-2
    )
    measured = difference(sae)
    assert measured["feature_acts_explained_variance/shared"] == pytest.approx(1, abs=1e-5)
    assert measured["firing_recall/shared"] > 0.999 and measured["rows"] == 500


def test_without_a_map_the_other_model_stands_at_its_mean(model: Literal["a", "b"]) -> None:
    crosscoder, acts = make_firing_dfc(), make_acts(50, 12)
    other = crosscoder.partition.models["b" if model == "a" else "a"]
    acts[:, other] = crosscoder.b_dec[other].detach()
    sae = crosscoder.export_sae(model)
    expected = crosscoder.encode(acts)[:, sae.cfg.metadata.latents]
    code = sae.encode(acts[:, crosscoder.partition.models[model]])
    torch.testing.assert_close(code, expected, rtol=1e-4, atol=1e-3)


def test_a_crosscoder_that_does_not_centre_its_input_is_exported_alike(
    model: Literal["a", "b"],
) -> None:
    crosscoder, affine_maps, acts = make_firing_dfc(), linear_map(), make_acts(50, 12)
    crosscoder.cfg.apply_b_dec_to_input = False
    acts[:, 5:], acts[:, :5] = (
        (affine_maps.to_b(acts[:, :5]), acts[:, :5])
        if model == "a"
        else (acts[:, 5:], affine_maps.to_a(acts[:, 5:]))
    )
    sae = crosscoder.export_sae(model, affine_maps)
    expected = crosscoder.encode(acts)[:, sae.cfg.metadata.latents]
    code = sae.encode(acts[:, crosscoder.partition.models[model]])
    torch.testing.assert_close(code, expected, rtol=1e-3, atol=1e-2)


def test_the_other_models_latents_are_left_out_and_the_rest_named() -> None:
    crosscoder = make_firing_dfc()  # 6 of A's, 4 of B's, 14 shared
    assert crosscoder.export_sae("a").cfg.metadata.latents == [*range(6), *range(10, 24)]
    assert crosscoder.export_sae("b").cfg.metadata.latents == list(range(6, 24))


def test_saved_and_opened_by_saelens_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    sae = make_firing_dfc().export_sae("b", linear_map(), [make_acts(100, 12)])
    sae.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert type(again) is JumpReLUSAE
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    for name, weight in sae.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_decoders_of_norm_1_change_neither_what_fires_nor_what_is_rebuilt() -> None:
    sae, acts = make_firing_dfc().export_sae("a", linear_map()), make_acts(200, 5)
    sae.threshold.data.uniform_(0, 5)
    code, rebuilt, norms = sae.encode(acts), sae(acts), sae.W_dec.norm(dim=-1)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20))
    assert torch.equal(sae.encode(acts) > 0, code > 0)
    torch.testing.assert_close(sae.encode(acts), code * norms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(acts), rebuilt, rtol=1e-4, atol=1e-3)


def test_a_crosscoder_without_exclusive_latents_is_exported_whole() -> None:
    crosscoder = make_standard().to_inference()
    sae = crosscoder.export_sae("a", rows=[make_acts(100, 12)])
    assert sae.cfg.metadata.latents == list(range(24))
    assert "firing_recall/a_exclusive" not in difference(sae)


def test_exporting_changes_nothing_of_the_crosscoder() -> None:
    crosscoder = make_firing_dfc()
    before, cfg = copy.deepcopy(crosscoder.state_dict()), crosscoder.cfg.to_dict()
    sae = crosscoder.export_sae("a", linear_map(), [make_acts(10, 12)])
    for weight in sae.parameters():
        weight.data.zero_()
    assert all(torch.equal(w, before[name]) for name, w in crosscoder.state_dict().items())
    assert crosscoder.cfg.to_dict() == cfg


def test_what_does_not_fit_is_refused() -> None:
    crosscoder = make_firing_dfc()
    with pytest.raises(
        ValueError, match="map goes from 3 dimensions to 7, this crosscoder's model A has 5"
    ):
        crosscoder.export_sae("a", linear_map(d_a=3))
    with pytest.raises(ValueError, match="Rows are 9 wide, this crosscoder's are 5 \\+ 7"):
        crosscoder.export_sae("a", rows=[make_acts(4, 9)])
    only_b = Crosscoder(CrosscoderConfig(d_in=12, d_sae=4, d_a=5, d_b=7, n_b_exclusive=4))
    with pytest.raises(ValueError, match="No latent of this crosscoder uses model A"):
        only_b.export_sae("a")


def test_a_large_dictionary_is_taken_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder, affine_maps = make_firing_dfc(), linear_map()
    whole = crosscoder.export_sae("b", affine_maps).state_dict()
    monkeypatch.setattr("sae_lens_dfc.crosscoders.export.ROWS_PER_CHUNK", 5)
    for name, weight in crosscoder.export_sae("b", affine_maps).state_dict().items():
        torch.testing.assert_close(weight, whole[name])


def test_in_bfloat16_it_is_measured_against_activations_as_they_are() -> None:
    crosscoder, acts = make_firing_dfc(), make_acts(300, 12) + 1e4
    crosscoder.b_dec.data = acts.mean(dim=0)
    half = crosscoder.to(torch.bfloat16)
    half.cfg.dtype = "bfloat16"
    sae = half.export_sae("a", rows=[acts])
    assert sae.W_enc.dtype == torch.bfloat16
    with torch.no_grad():
        rebuilt = sae(acts[:, :5]).double()
    x = acts[:, :5].double()
    expected = 1 - ((x - rebuilt).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()).item()
    assert difference(sae)["explained_variance/exported"] == pytest.approx(expected, rel=1e-4)


def test_without_rows_it_says_that_nothing_was_measured() -> None:
    metadata = make_firing_dfc().export_sae("a", linear_map()).cfg.metadata
    assert str(metadata.difference_to_crosscoder).startswith("not measured")
    assert metadata.other_model_filled_in_by == "an affine map"


@pytest.fixture(scope="module")
def toy() -> tuple[Crosscoder, AffineMaps, list[Tensor]]:
    """A trained crosscoder of a pair in which B's features are A's through a map, and pairs it has
    not seen."""
    pair = ToyPair(ToyPairConfig(n_features=64, d_a=32, d_b=24, active_features=3.0))
    cfg = dfc_config(
        d_a=32, d_b=24, d_sae=64, k=3, a_exclusive_fraction=0.1, b_exclusive_fraction=0.1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crosscoder = DFCTrainingCrosscoder(cfg)
        CrosscoderSAETrainer(sae_trainer_config(512, 400), crosscoder, pair.batches(512)).fit()
    fit, held_out = (list(islice(pair.batches(500, seed=seed), 8)) for seed in (5, 6))
    return crosscoder.to_inference(), fit_affine_maps(PairMoments.of(fit), 32), held_out


def test_the_map_tells_the_other_models_share_better_than_its_mean(
    toy: tuple[Crosscoder, AffineMaps, list[Tensor]], model: Literal["a", "b"]
) -> None:
    crosscoder, affine_maps, held_out = toy
    by_map, by_mean = (
        difference(crosscoder.export_sae(model, s, held_out)) for s in (affine_maps, None)
    )
    name = "feature_acts_explained_variance/shared"
    assert by_map[name] > by_mean[name] + 3 * (by_map[f"{name}/se"] + by_mean[f"{name}/se"])
    assert by_map["explained_variance/exported"] > by_mean["explained_variance/exported"]
    assert by_map["explained_variance/exported"] < by_map["explained_variance/crosscoder"]


# --- in SAELens' own models ---


@torch.no_grad()
def of_pair(pair: ModelPair) -> Crosscoder:
    crosscoder = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    crosscoder.b_dec.zero_()
    for name, model in pair.describe().items():
        crosscoder.cfg.metadata[name] = model
    crosscoder.cfg.metadata.dataset_path = "cpython-docs"
    crosscoder.cfg.metadata.context_size = 32
    return crosscoder


def hooked(cfg: ModelConfig) -> Any:
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformer

    plain = load_model(replace(cfg, model_class_name="HookedTransformer")).model
    assert isinstance(plain, HookedTransformer)
    model = HookedSAETransformer(plain.cfg, tokenizer=plain.tokenizer)
    model.load_state_dict(plain.state_dict())
    return model


def bridged(cfg: ModelConfig) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(
        cfg.model_name,
        hf_model=AutoModelForCausalLM.from_pretrained(cfg.model_name, attn_implementation="eager"),
        tokenizer=AutoTokenizer.from_pretrained(cfg.model_name),
        device="cpu",
    )


@pytest.fixture(params=[pytest.param(hooked, marks=needs_hooked_transformer), bridged])
def sae_model(request: pytest.FixtureRequest, llama_config: ModelConfig) -> Any:
    """SAELens' model, in either class."""
    make: Callable[[ModelConfig], Any] = request.param
    return make(llama_config)


def tokens_of(model: Any) -> Tensor:
    return torch.tensor([model.tokenizer(TEXT)["input_ids"][:24]])


@torch.no_grad()
def test_saelens_models_run_with_it(sae_model: Any, pair: ModelPair) -> None:
    sae, ids = of_pair(pair).export_sae("a"), tokens_of(sae_model)
    acts = pair.a.activations(ids, torch.ones_like(ids))
    name = f"{pair.a.hook_name}.hook_sae_acts_post"
    if isinstance(sae_model, SAETransformerBridge):
        name = sae_model.get_sae_hook_name(sae)
    logits, cache = sae_model.run_with_cache_with_saes(ids, saes=[sae])
    expected = sae.encode(acts)
    assert (expected > 0).float().mean() > 0.1
    torch.testing.assert_close(cache[name], expected, rtol=1e-3, atol=1e-4)
    plain = sae_model(ids)
    assert (logits - plain).abs().max() > 1e-3
    with_error = sae_model.run_with_saes(ids, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(sae_model(ids), plain)


@pytest.mark.slow
@needs_hooked_transformer
@torch.no_grad()
def test_at_attention_heads_it_takes_them_apart_as_saelens_does(llama_config: ModelConfig) -> None:
    cfg = replace(llama_config, hook_name="blocks.1.attn.hook_z")
    pair = ModelPair.load(cfg, llama_config)
    crosscoder, rows = of_pair(pair), make_acts(20, pair.d_a + pair.d_b)
    sae, model = crosscoder.export_sae("a", rows=[rows]), hooked(cfg)
    assert difference(sae)["rows"] == 20
    ids = tokens_of(model)
    _, cache = model.run_with_cache_with_saes(ids, saes=[sae])
    sae.turn_off_forward_pass_hook_z_reshaping()
    expected = sae.encode(pair.a.activations(ids, torch.ones_like(ids)))
    torch.testing.assert_close(
        cache[f"{cfg.hook_name}.hook_sae_acts_post"], expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_saelens_store_reads_its_activations_without_the_first_position(
    pair: ModelPair, llama_config: ModelConfig
) -> None:
    # In TransformerLens 3.9 the newer class has no activations under this name for the store.
    model: Any = (hooked if HAS_HOOKED_TRANSFORMER else bridged)(llama_config)
    sae = of_pair(pair).export_sae("a")
    assert model.tokenizer is not None
    model.tokenizer.pad_token = model.tokenizer.bos_token
    store = ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"text": [TEXT] * 40}),
        streaming=False,
        store_batch_size_prompts=2,
        total_tokens=40,
    )
    assert store.get_activations(store.get_batch_tokens(2)).shape[:2] == (2, 31)


def test_it_has_what_saebench_reads(pair: ModelPair, tmp_path: Path) -> None:
    """sae_bench 0.6.0: custom_saes/base_sae.py and _standardize_sae_cfg in
    sae_bench_utils/general_utils.py."""
    of_pair(pair).export_sae("a").save_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    assert sae.W_enc.shape == (d_in, d_sae) and sae.W_dec.shape == (d_sae, d_in)
    assert sae.b_enc.shape == (d_sae,) and sae.b_dec.shape == (d_in,)
    assert sae.device == torch.device("cpu") and sae.dtype == torch.float32
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(d_sae), rtol=0, atol=1e-5)
    acts = torch.randn(2, 3, d_in)
    torch.testing.assert_close(sae(acts.flatten(0, 1)).view_as(acts), sae.decode(sae.encode(acts)))
    metadata = sae.cfg.metadata
    assert metadata.model_name == "tiny-llama" and metadata.hook_name == pair.a.hook_name
    assert (metadata.hook_layer, metadata.context_size, metadata.prepend_bos) == (1, 32, True)
    json.dumps(sae.cfg.to_dict())
