import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_lens_dfc.analysis.causal import downstream as downstream_module
from sae_lens_dfc.analysis.causal.mapped_loss import mapped_loss, named_groups, who_knows_more
from sae_lens_dfc.data.activations import PairedRows, paired_activations, rows_in
from sae_lens_dfc.data.alignment.segments import Segment
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.stats.affine_maps import RIDGE, AffineMaps, fit_affine_maps
from sae_lens_dfc.stats.jackknife import SE
from sae_lens_dfc.stats.moments import PairMoments
from tests.analysis.causal.test_downstream import HuggingFace, contexts_of, rows_of
from tests.helpers import batches_of

N_WORDS = 8
"""Words of each of two classes in the made text."""


def maps_of(rows: Sequence[PairedRows], d_a: int) -> AffineMaps:
    return fit_affine_maps(PairMoments.of(r.acts for r in rows), d_a)


@pytest.fixture(scope="module")
def rows(pair: ModelPair) -> list[PairedRows]:
    """Some are outliers, and not every token is paired."""
    return rows_of(pair, outlier_factor=1.2)


@pytest.fixture(scope="module")
def measured(pair: ModelPair, rows: list[PairedRows]) -> dict[str, float]:
    return mapped_loss(pair, rows, maps_of(rows, pair.d_a))


def ridge_prediction(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression of `y` on `x` as least squares on rows with the penalty appended."""
    x, y = x.double(), y.double()
    centered, target = x - x.mean(dim=0), y - y.mean(dim=0)
    penalty = math.sqrt(RIDGE * centered.pow(2).mean().item() * len(x))
    d = x.shape[1]
    stacked = torch.cat([centered, penalty * torch.eye(d, dtype=torch.double)])
    zeros = torch.zeros(d, y.shape[1], dtype=torch.double)
    weights = torch.linalg.lstsq(stacked, torch.cat([target, zeros])).solution
    return (centered @ weights + y.mean(dim=0)).float()


def test_rises_are_those_of_hugging_faces_own_model_and_of_least_squares(
    pair: ModelPair,
    rows: list[PairedRows],
    measured: dict[str, float],
    llama_folder: Path,
) -> None:
    model = HuggingFace(llama_folder)
    acts = torch.cat([r.acts for r in rows])
    acts_a, acts_b = acts[:, : pair.d_a], acts[:, pair.d_a :]
    mapped, mean = ridge_prediction(acts_b, acts_a), acts_a.mean(dim=0)
    order = {
        (int(c), int(s)): i
        for i, (c, s) in enumerate(
            zip(
                *(torch.cat([getattr(r, n) for r in rows]) for n in ("context", "segment")),
                strict=True,
            )
        )
    }
    keys = [
        [(c.number, int(s)) for s in batch.segment[batch.context == c.number]]
        for batch in rows
        for c in batch.contexts
    ]
    n = untouched = given_map = given_mean = 0.0
    for (ids, at), of_context in zip(contexts_of(rows), keys, strict=True):
        predicted = len(ids) - 1 - min(at)
        values = mapped[[order[key] for key in of_context]]
        n += predicted
        untouched += model.run(ids, min(at), replaced=[])[0] * predicted
        given_map += model.run(ids, min(at), replaced=at, by=values)[0] * predicted
        given_mean += model.run(ids, min(at), replaced=at, by=mean)[0] * predicted
    assert measured["mapped_loss/untouched/a"] == pytest.approx(untouched / n, rel=1e-5)
    rise, rise_of_mean = (given_map - untouched) / n, (given_mean - untouched) / n
    assert abs(rise) > 1e-3 and abs(rise - rise_of_mean) > 1e-4
    assert measured["mapped_loss/rise/a"] == pytest.approx(rise, abs=2e-5)
    assert measured["mapped_loss/rise_of_mean/a"] == pytest.approx(rise_of_mean, abs=2e-5)
    assert measured["mapped_loss/b_minus_a"] == pytest.approx(
        measured["mapped_loss/rise/b"] - measured["mapped_loss/rise/a"]
    )
    of_b = 0
    for batch in rows:
        for c in batch.contexts:
            first = batch.segment[batch.context == c.number].min()
            of_b += len(c.segments.ids_b) - 1 - int(c.segments.last_b[first])
    assert measured["mapped_loss/b_over_a"] == pytest.approx(
        measured["mapped_loss/untouched/b"] * of_b / untouched, rel=1e-5
    )


def word_folder(parent: Path, knows_class: bool, tokenizer_folder: Path) -> Path:
    """A Llama whose activation at its hook is the token's embedding, and whose prediction is read
    from two dimensions: the class of the token, `+1` or `-1`, and a constant. It expects any word
    of the other class; where the class is 0, any word."""
    folder = parent / ("knows" if knows_class else "ignores")
    config = LlamaConfig.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        identity = torch.randint(0, 2, (N_WORDS, config.hidden_size)) * 2.0 - 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        first, second = slice(1, 1 + N_WORDS), slice(1 + N_WORDS, 1 + 2 * N_WORDS)
        embedding = model.model.embed_tokens.weight
        embedding[first], embedding[second] = identity, identity
        embedding[first, 0], embedding[second, 0] = 1, -1
        embedding[:, 1] = 1
        head = model.lm_head.weight
        head.zero_()
        head[:, 1] = -50
        head[1 : 1 + 2 * N_WORDS, 1] = 0
        head[first, 0], head[second, 0] = -30, 30
        if not knows_class:
            embedding[:, 0] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> ModelPair:
    """Model A knows the class of the next word; model B is the same but for that."""
    parent = tmp_path_factory.mktemp("words")
    a, b = (
        ModelConfig(str(word_folder(parent, knows, llama_folder)), "blocks.1.hook_resid_post")
        for knows in (True, False)
    )
    return ModelPair.load(a, b)


def word_rows(pair: ModelPair, size: int = 1) -> list[PairedRows]:
    """Contexts of all words in which the class alternates and tells nothing of the word in its
    class."""
    generator = torch.Generator().manual_seed(0)
    contexts = []
    for _ in range(20):
        chosen = (1 + torch.randperm(N_WORDS, generator=generator)).tolist()
        ids = [i for word in chosen for i in (word, word + N_WORDS)]
        contexts.append([pair.bos_segment, *(Segment((i,), (i,)) for i in ids)])
    batches = batches_of(contexts, size)
    return list(paired_activations(pair, batches, PairCounts(), outlier_factor=math.inf))


def test_a_model_given_the_map_of_one_without_a_direction_loses_what_it_read_there(
    words: ModelPair,
) -> None:
    rows = word_rows(words)
    found = mapped_loss(words, rows, maps_of(rows, words.d_a))
    # Of 2 N words, A leaves N open, and without their class as many as B: 2 N.
    assert found["mapped_loss/untouched/a"] == pytest.approx(math.log(N_WORDS), abs=1e-3)
    assert found["mapped_loss/untouched/b"] == pytest.approx(math.log(2 * N_WORDS), abs=1e-3)
    assert found["mapped_loss/rise/a"] == pytest.approx(math.log(2), abs=1e-3)
    assert found["mapped_loss/rise_of_mean/a"] == pytest.approx(math.log(2), abs=1e-3)
    assert found["mapped_loss/rise/b"] == pytest.approx(0, abs=1e-3)
    assert found["mapped_loss/rise_of_mean/b"] == pytest.approx(0, abs=1e-3)
    assert found["mapped_loss/b_over_a"] == pytest.approx(4 / 3, abs=1e-3)
    assert "A knows what B does not" in who_knows_more(found)


@pytest.mark.slow
def test_the_other_way_round_the_other_model_is_named(words: ModelPair) -> None:
    turned = ModelPair(words.b, words.a)
    rows = word_rows(turned)
    found = mapped_loss(turned, rows, maps_of(rows, turned.d_a))
    assert found["mapped_loss/b_minus_a"] == pytest.approx(math.log(2), abs=1e-3)
    assert "B knows what A does not" in who_knows_more(found)


@pytest.mark.slow
def test_one_model_twice_loses_nothing_on_either_side_and_is_not_named(
    llama_config: ModelConfig, words: ModelPair
) -> None:
    for twin in (ModelPair.load(llama_config, llama_config), ModelPair(words.a, words.a)):
        rows = rows_of(twin) if twin.a is not words.a else word_rows(twin)
        found = mapped_loss(twin, rows, maps_of(rows, twin.d_a))
        for m in ("a", "b"):
            assert found[f"mapped_loss/rise/{m}"] == pytest.approx(0, abs=1e-3)
            assert abs(found[f"mapped_loss/rise_of_mean/{m}"]) > 3e-3
        assert found["mapped_loss/b_minus_a"] == pytest.approx(0, abs=1e-6)
        assert "neither is shown to know more" in who_knows_more(found)


def grouped(rows: Sequence[PairedRows], names: Sequence[str]) -> list[PairedRows]:
    """The contexts in groups of these names by turns."""
    return [
        r._replace(contexts=[c._replace(group=names[c.number % len(names)]) for c in r.contexts])
        for r in rows
    ]


@pytest.mark.slow
def test_each_group_is_measured_as_if_it_were_alone(
    pair: ModelPair, rows: list[PairedRows], measured: dict[str, float]
) -> None:
    maps, mixed = maps_of(rows, pair.d_a), grouped(rows, ["pt", "en", "en"])
    found = mapped_loss(pair, mixed, maps)
    assert sorted(named_groups(found)) == ["en", "pt"]
    for name, value in measured.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    for group in ("en", "pt"):
        own = [rows_in(r, [c for c in r.contexts if c.group == group])[0] for r in mixed]
        for name, value in mapped_loss(pair, own, maps).items():
            key = name.replace("mapped_loss/", f"mapped_loss/{group}/")
            assert found[key] == pytest.approx(value, abs=1e-5), key
    assert "By group of text: on " in who_knows_more(found)
    assert named_groups(mapped_loss(pair, grouped(rows, ["en"]), maps)) == []


@pytest.mark.slow
def test_how_many_contexts_are_held_at_once_changes_no_measure(
    pair: ModelPair,
    rows: list[PairedRows],
    measured: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downstream_module, "MAX_LOGITS", 1)
    again = mapped_loss(pair, rows, maps_of(rows, pair.d_a))
    assert again == pytest.approx(measured, abs=1e-5)
    assert {f"mapped_loss/rise/a{SE}", f"mapped_loss/b_minus_a{SE}"} <= set(again)


def test_without_rows_contexts_or_upper_layers_there_is_no_measure(
    pair: ModelPair, rows: list[PairedRows], llama_config: ModelConfig
) -> None:
    maps = maps_of(rows, pair.d_a)
    with pytest.raises(ValueError, match="No pair was evaluated"):
        mapped_loss(pair, [], maps)
    with pytest.raises(ValueError, match="come without their contexts"):
        mapped_loss(pair, [rows[0]._replace(contexts=())], maps)
    half = load_model(replace(llama_config, drop_unused_layers=True))
    with pytest.raises(ValueError, match="loaded with drop_unused_layers"):
        mapped_loss(ModelPair(half, pair.b), rows, maps)


def test_what_was_not_measured_is_not_said() -> None:
    assert who_knows_more({}) == ""
    one_block = {
        "mapped_loss/rise/a": 1.0,
        "mapped_loss/rise/b": 0.0,
        "mapped_loss/b_minus_a": -1.0,
        "mapped_loss/b_over_a": 2.0,
    }
    assert who_knows_more(one_block).endswith("2.00 times A's: neither is shown to know more.")
