"""The cases of certain differences, made of small packages in place of those on the index."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.certain import cases, causal, glassllm, parallel_text
from benchmarks.certain.cases import (
    LANGUAGE_REAL,
    LANGUAGE_TINY,
    WITHHELD,
    Pair,
    made,
    passages,
)
from benchmarks.certain.run import (
    PRESETS,
    Settings,
    collected,
    run_certain_benchmark,
    run_config,
    runs,
)
from benchmarks.certain.withheld import mixed
from sae_lens_dfc.analysis.evaluation.measure import evidence_in, measure, train_crosscoder
from sae_lens_dfc.analysis.report.findings import EffectView
from sae_lens_dfc.analysis.screening.causal_tests import subject_of
from sae_lens_dfc.analysis.screening.shared_verdicts import SharedTest
from sae_lens_dfc.analysis.screening.verdicts import CausalTest, Way
from sae_lens_dfc.metrics.exclusivity.evidence import MIN_FIRINGS
from sae_lens_dfc.organisms.from_scratch import Training
from tests.benchmarks.certain import test_fetch

index = test_fetch.index

SMALL = Training(steps=2, batch=2, vocab_a=280, vocab_b=300)
SIZES = Settings(d_sae=40, k=4, max_unique_pairs=60, steps=6, eval_pairs=60)


@pytest.fixture
def here(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cases, "TRAINING", SMALL)
    monkeypatch.setitem(parallel_text.EDITIONS, "Italian", "x")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_withheld_models_differ_in_what_they_read() -> None:
    case = made(Pair(WITHHELD, 0.3, seed=1), "report")
    assert case.known_to == {"b_exclusive": ("Portuguese",)}
    a, b = (AutoModelForCausalLM.from_pretrained(m.model_name) for m in case.models)
    assert (a.config.model_type, b.config.model_type) == ("llama", "gpt2")
    assert a.config.hidden_size != b.config.hidden_size
    sizes = [len(AutoTokenizer.from_pretrained(m.model_name)) for m in case.models]
    assert sizes[0] != sizes[1]
    # The models are trained on the other half of the chapters.
    read, trained_on = (
        {*passages(path)} for path in (case.text["English"], _tune(case.text["English"]))
    )
    assert read and trained_on and not read & trained_on
    assert made(Pair(WITHHELD, 0.3, seed=1), "report") == case


def _tune(path: Path) -> Path:
    return path.parent.parent / "tune" / path.name


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_null_of_two_models_has_two_that_read_the_same() -> None:
    null = made(Pair(WITHHELD, 0.3, is_null=True, seed=1), "report")
    pair = made(Pair(WITHHELD, 0.3, seed=1), "report")
    assert null.known_to == {}
    assert null.models[1] == pair.models[1]
    assert null.models[0] != pair.models[0]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_tuning_is_on_another_language_and_on_other_chapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tune = made(Pair(WITHHELD, 0.3), "tune")
    assert tune.known_to == {"b_exclusive": ("Italian",)}
    monkeypatch.setattr(glassllm, "LANGUAGES", ("e", "p"))
    tiny = [made(Pair(LANGUAGE_TINY), half).text["English"] for half in ("tune", "report")]
    assert not {*passages(tiny[0])} & {*passages(tiny[1])}


@pytest.mark.usefixtures("here")
def test_the_real_models_read_as_much_english_as_all_that_only_one_of_them_knows(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, gpt2_folder: Path
) -> None:
    folders = {cases.DEMO_A: llama_folder, cases.DEMO_B: gpt2_folder}
    monkeypatch.setattr(cases, "unpack", folders.__getitem__)
    monkeypatch.setattr(cases, "FOREIGN", {"report": ("French", "Korean"), "tune": ()})
    monkeypatch.setattr(
        cases, "MORE_EDITIONS", {"English": "k", "French": "a", "Korean": "x", "Polish": "k"}
    )
    case = made(Pair(LANGUAGE_REAL), "report")
    assert case.known_to == {"b_exclusive": ("French", "Korean")}
    assert {name: passages(path)[0][0] for name, path in case.text.items()} == {
        "English": "k",
        "French": "a",
        "Korean": "x",
    }
    sources = run_config(case, 0, SIZES).sources
    assert [source.weight for source in sources] == [2, 1, 1]
    null = made(Pair(LANGUAGE_REAL, is_null=True), "report")
    assert null.known_to == {} and null.models == (case.models[0],) * 2


def test_a_share_is_of_characters() -> None:
    texts = mixed(["a" * 80], ["b" * 4] * 100, 0.2, seed=0)
    assert sum(text.count("b") for text in texts) == 20
    assert mixed(["aa"], ["b"], 0.0, seed=0) == ["aa"]
    with pytest.raises(ValueError, match="needs 75 more characters of the other language"):
        mixed(["a" * 80], ["b" * 5], 0.5, seed=0)


def test_each_seed_has_every_pair_and_models_of_its_own() -> None:
    full = runs(PRESETS["full"])
    assert len(full) == 5 * len(PRESETS["full"].pairs)
    assert {run.pair.seed for run in full if run.pair.case == WITHHELD} == {0, 1, 2, 3, 4}
    assert {run.pair.seed for run in full if run.pair.case == LANGUAGE_TINY} == {0}


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_of_each_side_the_first_called_latents_are_tested_in_their_own_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every third test has no texts, and every second of the others shows an effect."""
    task = collected(made(Pair(WITHHELD, 0.3), "report"), 0, SIZES)
    crosscoder = train_crosscoder(task)
    measured = evidence_in(measure(crosscoder, task))
    firings = torch.full_like(measured.firings, MIN_FIRINGS)
    asked: list[int] = []

    def result(latent: int) -> CausalTest | None:
        asked.append(latent)
        if len(asked) % 3 == 0:
            return None
        used = Way(EffectView("", 0.3, 0, 1, {}), 0.001, len(asked) % 3 == 1)
        return CausalTest("b", 8, 0.4, used, used, used, off_topic=None, samples=[])

    sizes = causal.CausalSizes(n_tested=3, n_shared=4)
    monkeypatch.setattr(causal, "causal_tests", lambda *_args: result)
    every = measured._replace(is_exclusive=torch.ones_like(measured.is_a), firings=firings)
    shares = {"Portuguese": torch.ones(SIZES.d_sae)}
    on = subject_of(crosscoder, task.pair, task.data)
    found = causal.used(on, every, shares, {"b_exclusive": ["Portuguese"]}, sizes)
    assert measured.is_a[asked].tolist() == [True] * 3 + [False] * 3
    assert found == {
        "a_exclusive": {"tested": 2, "used": 1, "right": 0},
        "b_exclusive": {"tested": 2, "used": 1, "right": 1},
    }
    none = every._replace(is_exclusive=torch.zeros_like(measured.is_a))
    nothing = causal.used(on, none, shares, {}, sizes)
    assert [sum(counts.values()) for counts in nothing.values()] == [0, 0]
    assert len(asked) == 6

    in_both: list[int] = []

    def of_shared(_on: object, is_a: bool, latent: int, *_args: object) -> SharedTest:
        in_both.append(latent)
        assert is_a == bool(measured.is_a[latent])
        p = 0.001 if len(in_both) % 2 == 0 else 0.9
        shown = used.shown
        return SharedTest("b", 20, shown, shown, shown, p, 0.5, 0.001)

    used = Way(EffectView("", 0.3, 0, 1, {}), 0.001, True)
    monkeypatch.setattr(causal, "tested_in_both", of_shared)
    half = torch.arange(SIZES.d_sae) < SIZES.d_sae // 2
    worse = every._replace(
        is_candidate=torch.zeros_like(measured.is_a),
        target_worse=torch.where(half, 0.9, 0.1),
        target_worse_se=torch.full_like(measured.known, 0.01),
    )
    counts = causal.in_both(on, worse, shares, {"b_exclusive": ["Portuguese"]}, sizes)
    total = {name: sum(own[name] for own in counts.values()) for name in counts["b_exclusive"]}
    assert len(in_both) == 8 and total["worse"] == total["others"] == 4
    # Every second shows a difference, and is used differently if the target predicts worse.
    different = [i for i in in_both[1::2] if half[i]]
    assert total["different"] == len(different)
    assert total["alike"] == 4 - len(set(in_both[4:]).intersection(different))
    assert counts["a_exclusive"]["different_right"] == counts["a_exclusive"]["worse_right"] == 0
    assert counts["b_exclusive"]["different_right"] == counts["b_exclusive"]["different"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_results_are_kept_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole path, on models that know nothing."""
    small = replace(
        PRESETS["small"],
        pairs=(Pair(WITHHELD, 0.3), Pair(WITHHELD, 0.3, is_null=True)),
        settings=SIZES,
    )
    monkeypatch.setitem(PRESETS, "small", small)
    monkeypatch.setattr("benchmarks.certain.run.BATCH_SIZE", 32)
    rows = run_certain_benchmark("small", tmp_path)
    assert [row["is_null"] for row in rows] == [False, True]
    assert {*rows[0]["knows_more"]} == {"English", "Portuguese"}
    assert json.loads((tmp_path / "certain.json").read_text()) == rows
    monkeypatch.setattr("benchmarks.certain.run.row", None)
    assert run_certain_benchmark("small", tmp_path) == rows
