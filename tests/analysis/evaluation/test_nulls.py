import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_dfc import ToyPair
from sae_lens_dfc.analysis.evaluation.measure import CausalOptions, measure
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.beyond_null import beyond_null
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from tests.analysis.causal.test_downstream import identity
from tests.helpers import dfc_config, write_pages
from tests.metrics.exclusivity.test_evidence import TOY, measured, perfect


@pytest.fixture(scope="module")
def case(
    pair: ModelPair,
    llama_config: ModelConfig,
    gpt2_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> PairTask:
    text = tmp_path_factory.mktemp("text") / "pages.jsonl"
    write_pages(text)
    cfg = CrosscoderRunnerConfig(
        dataset_path=str(text),
        sae=dfc_config(d_a=pair.d_a, d_b=pair.d_b),
        model_a=llama_config,
        model_b=gpt2_config,
        max_unique_pairs=600,
        eval_pairs=300,
        context_size=32,
        training_tokens=2048,
        train_batch_size_tokens=256,
    )
    return PairTask(cfg, pair, PairData.collect(PairedText(cfg, pair), "test"))


def joined(rows: Sequence[PairedRows]) -> torch.Tensor:
    return torch.cat([r.acts for r in rows])


def test_nulls_keep_the_groups_of_the_text(case: PairTask) -> None:
    assert {context.group for context in case.data.contexts} == {"pages"}
    for name in ("self", "shuffle"):
        assert {context.group for context in null_case(name, case).data.contexts} == {"pages"}


def test_contexts_know_the_name_of_their_source(case: PairTask, tmp_path: Path) -> None:
    said = {"low": "the sea is calm and the wind is low ", "high": "A MOUNTAIN IS HIGH OF ALL "}
    for name, text in said.items():
        lines = [json.dumps({"text": text * 8}) for _ in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in said]
    cfg = replace(case.cfg, sources=sources, eval_every_n_documents=2, n_ranks=2)
    data = PairData.collect(PairedText(cfg, case.pair), "test")
    assert {(c.source, c.group) for c in data.contexts} == {
        *((0, "low"), (1, "low"), (2, "high"), (3, "high"))
    }
    for context in data.contexts:
        text = case.pair.a.tokenizer.decode(context.segments.ids_a, skip_special_tokens=True)
        assert str(text).islower() == (context.group == "low")


def test_self_has_model_as_rows_twice_and_its_text(case: PairTask) -> None:
    null = null_case("self", case)
    d_a = case.pair.d_a
    for part in ("training", "held_out"):
        acts, was = joined(getattr(null.data, part)), joined(getattr(case.data, part))
        assert torch.equal(acts, torch.cat([was[:, :d_a]] * 2, dim=-1))
    assert (null.cfg.sae.d_a, null.cfg.sae.d_b, null.cfg.sae.d_in) == (d_a, d_a, 2 * d_a)
    assert null.pair.b is case.pair.a
    texts = [data.contexts[0].segments for data in (null.data, case.data)]
    assert texts[0].ids_b.tolist() == texts[1].ids_a.tolist()
    rows = null.data.held_out[0]
    number = int(rows.context[0])
    again = null.pair.activations([null.data.contexts[number].segments])[0]
    own = rows.acts[rows.context == number]
    torch.testing.assert_close(
        again[rows.segment[rows.context == number]], own, rtol=1e-4, atol=1e-4
    )


def test_shuffle_keeps_every_row_of_both_models_and_no_pair(case: PairTask) -> None:
    null = null_case("shuffle", case)
    d_a = case.pair.d_a
    acts, was = joined(null.data.training), joined(case.data.training)
    assert torch.equal(acts[:, :d_a], was[:, :d_a])
    assert torch.equal(acts[:, d_a:].sort(dim=0).values, was[:, d_a:].sort(dim=0).values)
    assert (acts[:, d_a:] == was[:, d_a:]).all(dim=1).double().mean() < 0.02
    assert null.order_b is not None
    assert null.order_b(50).sort().values.tolist() == list(range(50))


@pytest.mark.slow
def test_of_shuffled_pairs_each_models_reconstruction_replaces_what_it_reconstructs(
    case: PairTask,
) -> None:
    null = null_case("shuffle", case)
    crosscoder = identity(null.pair.d_a, null.pair.d_b)
    found = measure(crosscoder, null, CausalOptions(downstream_pairs=60)).metrics
    for m in "ab":
        assert found[f"loss_recovered/{m}"] == pytest.approx(1, abs=1e-3)
        assert found[f"kl/{m}"] == pytest.approx(0, abs=1e-5)


def test_the_real_rows_stay_as_they_were(case: PairTask) -> None:
    before = joined(case.data.training).clone()
    for name in ("shuffle", "self"):
        null_case(name, case)
    assert torch.equal(joined(case.data.training), before)


@pytest.mark.parametrize("name", ["self", "shuffle"])
def test_in_place_each_real_batch_is_gone_when_the_next_one_is_changed(
    name: str, case: PairTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [r._replace(acts=r.acts.clone()) for r in case.data.training]
    kept = [weakref.ref(r.acts) for r in rows]
    own = case._replace(data=replace(case.data, training=rows))
    del rows
    left: list[int] = []
    cat = torch.cat

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        left.append(sum(ref() is not None for ref in kept))
        return cat(*args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    null = null_case(name, own, in_place=True)
    monkeypatch.undo()
    n = len(kept)
    # The shuffle first joins model B's side of all.
    first = ["shuffle"].count(name)
    assert n > 1 and left[first : first + n] == list(range(n, 0, -1))
    assert own.data.training == []
    assert torch.equal(joined(null.data.training), joined(null_case(name, case).data.training))


def test_seed_needs_another_initialization_of_model_a(
    case: PairTask, gpt2_config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match="'seed' goes with --seed-model"):
        null_case("seed", case)
    with pytest.raises(ValueError, match="Give another initialization of model A"):
        null_case("seed", case, gpt2_config)


def test_another_null_is_refused_by_name(case: PairTask) -> None:
    with pytest.raises(ValueError, match="no null 'twin'. Choose from self, shuffle, seed"):
        null_case("twin", case)


@pytest.mark.slow
def test_true_features_are_beyond_a_null_of_halves_and_halves_are_not() -> None:
    real, same = (
        ToyPair(TOY),
        ToyPair(replace(TOY, a_exclusive_fraction=0.0, b_exclusive_fraction=0.0)),
    )
    _, run = measured(perfect(real), real)
    _, null = measured(perfect(same, n_split=12), same)
    beyond = beyond_null("self", run, null)
    assert beyond["transfer/auc/a_exclusive"] == beyond["transfer/auc/b_exclusive"] == 1.0
    itself = beyond_null("self", null, null)
    assert itself["transfer/auc/a_exclusive"] <= 0.2


@pytest.mark.slow
def test_shared_latents_are_beyond_shuffled_pairs() -> None:
    toy = ToyPair(TOY)
    wrong = ToyPair(replace(TOY, pairing_noise=1.0))
    _, run = measured(perfect(toy), toy)
    _, null = measured(perfect(wrong), wrong)
    beyond = beyond_null("shuffle", run, null)
    assert beyond["transfer/auc/shared"] == 1.0
    assert beyond_null("shuffle", null, null)["transfer/auc/shared"] == pytest.approx(
        0.05, abs=0.05
    )
