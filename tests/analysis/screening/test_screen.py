"""`sae-lens-dfc screen RUN`: its rules by hand, and the whole of it on two tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_dfc.analysis.latents.max_activating import FiringPosition
from sae_lens_dfc.analysis.report.findings import EffectView
from sae_lens_dfc.analysis.screening import causal_tests as causal_tests_module
from sae_lens_dfc.analysis.screening import screen as screen_module
from sae_lens_dfc.analysis.screening import shared_tests as shared_tests_module
from sae_lens_dfc.analysis.screening import shared_verdicts as shared_verdicts_module
from sae_lens_dfc.analysis.screening.candidates import source_of, windows
from sae_lens_dfc.analysis.screening.verdicts import (
    CONFIRMED,
    NOT_CONFIRMED,
    OF_ONE_BASIS,
    OF_TWO_BASES,
    PARTIAL,
    UNTESTED,
    CausalTest,
    Explained,
    Way,
    findings,
    ranked,
    verdict_stage,
)
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from tests.helpers import batches_of, make_firing_dfc, train_tiny


def way(mean: float, p: float = 0.001, is_beyond: bool = True) -> Way:
    return Way(EffectView("effect", mean, 0, 1, {}), p, is_beyond)


def result(
    ablated: float | Way = 0.2, patched: float | Way = 0.1, used: Way | None = None
) -> CausalTest:
    of_ablated, of_patched = (x if isinstance(x, Way) else way(x) for x in (ablated, patched))
    of_used = used or way(0.3)
    return CausalTest("b", 8, 0.4, of_ablated, of_patched, of_used, off_topic=None, samples=[])


def evidence(
    known: Sequence[float] = (), exclusive: Sequence[int] = (), judged: Sequence[int] = ()
) -> LatentEvidence:
    """Of 24 latents; what is not given is unknown."""
    values = torch.full((24,), torch.nan)
    none = torch.zeros(24, dtype=torch.bool)
    fields = dict.fromkeys(LatentEvidence._fields, values)
    share, q, called = values.clone(), values.clone(), none.clone()
    share[: len(known)] = torch.tensor(known)
    q[list(judged)] = 1.0
    called[list(exclusive)] = True
    fields |= {"known": share, "q": q, "is_exclusive": called}
    return LatentEvidence(**fields)


def verdicts(
    results: dict[int, CausalTest | None],
    of: LatentEvidence | None = None,
) -> list[tuple[int, str]]:
    """Between models of one basis, or with evidence between others."""
    crosscoder = make_firing_dfc()
    order = OF_ONE_BASIS if of is None else OF_TWO_BASES
    every = findings(crosscoder, list(results), results, {}, of or evidence(), of is None)
    found = ranked(every, order)
    assert [one.rank for one in found] == list(range(1, len(found) + 1))
    return [(one.latent, one.verdict) for one in found]


def test_a_verdict_needs_both_ways_beyond_their_controls() -> None:
    assert verdicts(
        {
            1: result(patched=way(0.1, is_beyond=False)),
            2: result(way(0.2, is_beyond=False), way(0.1, is_beyond=False)),
            3: None,
            4: result(),
            5: result(ablated=0.3),
            6: result(patched=way(0.1, p=0.2)),
        }
    ) == [
        (5, CONFIRMED),
        (4, CONFIRMED),
        (1, PARTIAL),
        (6, PARTIAL),
        (2, NOT_CONFIRMED),
        (3, UNTESTED),
    ]


def test_a_difference_that_nobody_could_notice_is_not_confirmed() -> None:
    assert verdicts({1: result(ablated=0.001, patched=0.001)}) == [(1, NOT_CONFIRMED)]
    assert verdicts({1: result(ablated=0.02, patched=0.001)}) == [(1, PARTIAL)]


def test_p_values_are_corrected_for_how_many_were_tested() -> None:
    doubtful, poor = (result(way(0.2, p), way(0.1, p)) for p in (0.04, 0.9))
    alone = verdicts({1: doubtful})
    among = verdicts({1: doubtful, **dict.fromkeys(range(2, 9), poor)})
    assert alone == [(1, CONFIRMED)] and among[0] == (1, NOT_CONFIRMED)


def test_between_other_models_it_is_exclusive_by_evidence_and_used_by_its_own_effect() -> None:
    unused = result(used=way(0.3, is_beyond=False))
    results = {0: unused, 1: result(), 2: result(), 3: result(), 4: unused, 5: result(), 6: None}
    of = evidence([0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1], exclusive=[0, 1, 6], judged=range(5))
    assert verdicts(results, of) == [
        (1, "exclusive and used"),
        (0, "exclusive, no effect found"),
        (6, "exclusive, not tested"),
        (3, "shared"),
        (2, "nothing shown"),
        (4, "nothing shown"),
        (5, "not judged"),
    ]


def test_an_own_effect_needs_its_size_and_its_significance() -> None:
    of = evidence([0.1, 0.1], exclusive=[0], judged=[0])
    for used in (way(0.001), way(0.3, p=0.2)):
        assert verdicts({0: result(used=used)}, of) == [(0, "exclusive, no effect found")]
    # Neither the map nor the other model has a say.
    no_map = result(way(-0.1, 0.9, False), way(-0.1, 0.9, False))
    assert verdicts({0: no_map}, of) == [(0, "exclusive and used")]


def test_what_is_left_out_is_counted() -> None:
    crosscoder = make_firing_dfc()
    poor = way(0.2, is_beyond=False)
    results = {1: result(), 2: result(poor, poor), 3: None}
    said = {1: Explained("cats", 0.9, ["x"])}
    found = findings(crosscoder, [1, 2, 3], results, said, evidence(), one_basis=True)
    stage = verdict_stage(found)
    assert (stage.intake, stage.output) == (3, 1)
    assert stage.dropped == {NOT_CONFIRMED: 1, UNTESTED: 1}
    assert found[0].description == "cats" and found[0].concerns == ["x"]
    assert any("removes 50%" in reason and "removes 25%" in reason for reason in found[0].reasons)


def test_the_source_is_the_model_that_has_it() -> None:
    crosscoder = make_firing_dfc()
    sources = [source_of(crosscoder, i) for i in range(24)]
    slices = crosscoder.partition.slices
    assert set(sources[slices["a_exclusive"]]) == {"a"}
    assert set(sources[slices["b_exclusive"]]) == {"b"}


def test_a_window_ends_where_the_latent_fires(pair: ModelPair) -> None:
    text = pair.segments("The cat sat on the mat and in 1989 the cat sat on the mat.")[0]
    contexts = batches_of([text.after(pair.bos_segment)])[0].contexts
    [window] = windows(pair, contexts, [FiringPosition(0, 3, 1.0, None)])
    assert list(window) == list(contexts[0].segments[:4])


# --- the whole of it ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    return train_tiny(folder, llama_folder, gpt2_folder, "--eval-pairs", "1500")


FEW = ("--keep=4", "--keep-shared=2", "--divergence-pairs=100", "--texts=4", "--controls=2")


@pytest.mark.slow
def test_a_screening_writes_its_report_and_goes_on_where_it_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify, calls = causal_tests_module.verify, list[int]()

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return verify(*args, **kwargs)

    output = tmp_path / "out"
    args = ["screen", str(run), "--output", str(output), *FEW]
    for module in (shared_tests_module, shared_verdicts_module):
        monkeypatch.setattr(module, "MIN_SHARED_TEXTS", 3)
    monkeypatch.setattr(causal_tests_module, "verify", stopping)
    assert main(args) not in (0, 1)
    assert not output.exists() and (tmp_path / "out.progress.jsonl").exists()
    monkeypatch.setattr(causal_tests_module, "verify", verify)
    assert main([*args, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = json.loads((output / "screening.json").read_text())
    assert printed == stored and not (tmp_path / "out.progress.jsonl").exists()
    fresh = tmp_path / "fresh"
    assert main(["screen", str(run), "--output", str(fresh), *FEW]) == 0
    assert json.loads((fresh / "screening.json").read_text()) == stored

    stages, found = stored["stages"], stored["findings"]
    assert stages[0]["intake"] == 64 and len(found) == 4
    for before, after in zip(stages, stages[1:], strict=False):
        assert before["output"] == after["intake"]
    for stage in stages:
        assert stage["intake"] - stage["output"] == sum(stage["dropped"].values())
    # Two unrelated models have no basis in common: what is looked at is what one alone may use.
    assert {one["partition"] for one in found} <= {"a_exclusive", "b_exclusive"}
    assert {one["verdict"] for one in found} <= set(OF_TWO_BASES)
    tested = [one for one in found if one["effects"]]
    assert tested
    for one in tested:
        assert len(one["effects"]) >= 3 and one["effects"][0]["name"].endswith("moves by, bits")
        assert len(one["samples"]) == 4
        assert all(
            set(e["controls"]) == {"random directions", "shared latents"}
            for e in one["effects"][:3]
        )
    shared = stored["shared"]
    assert 2 <= len(shared) <= 4 and {one["partition"] for one in shared} == {"shared"}
    assert [one["rank"] for one in shared] == list(range(1, len(shared) + 1))
    assert any(len(one["effects"]) == 3 for one in shared)
    explained = stored["divergence"]
    assert 0 < explained["divergence/bits"] < 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert {name: metrics[name] for name in explained} == explained
    page = (output / "report.html").read_text()
    assert "Shared latents, ablated in both models" in page and "Divergence explained" in page
    assert f"#latent-{found[0]['latent']}" in page and found[0]["verdict"] in page


@pytest.mark.slow
def test_without_samples_and_divergence_the_verdicts_are_the_same(
    run: Path, tmp_path: Path
) -> None:
    found: list[list[dict[str, Any]]] = []
    for name, flags in (("with", []), ("without", ["--no-samples", "--divergence-pairs", "0"])):
        output = tmp_path / name
        assert main(["screen", str(run), "--output", str(output), *FEW, *flags]) == 0
        written = json.loads((output / "screening.json").read_text())
        found.append(written["findings"])
        assert bool(written["divergence"]) == (name == "with")
        assert ("Divergence explained" in (output / "report.html").read_text()) == (name == "with")
    shown, silent = found
    assert any(one["samples"] for one in shown)
    assert silent == [{**one, "samples": []} for one in shown]


@pytest.mark.slow
def test_a_judge_stands_before_the_steering(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def judge(prompt: str, /) -> str:
        asked.append(prompt)
        if "Firing:" in prompt:
            return "Firing: none"
        return "Description: anything" if "Description:" in prompt else "Concerns: none"

    monkeypatch.setattr(screen_module, "judge_for", lambda _options: judge)
    monkeypatch.setattr(causal_tests_module, "verify", None)
    args = ["screen", str(run), "--output", str(tmp_path / "out"), *FEW]
    assert main(args) == 0
    stages = {
        s["stage"]: s for s in json.loads((tmp_path / "out/screening.json").read_text())["stages"]
    }
    # A description that tells nothing lets no latent through, and none is tested.
    assert stages["described"]["output"] == 4
    assert stages["predicted by its description"]["output"] == 0
    assert sum("Description:" in prompt for prompt in asked) == 4
    assert "at most 12 questions" in caplog.text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--keep", "0"), "keep must be at least 1"),
        (("--texts", "11"), "texts must be at least 3 and at most 10"),
        (("--flagged-only",), "only apply with --judge"),
        (("--evidence", "nowhere"), "nowhere"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["screen", str(run), "--output", str(tmp_path / "out"), *flags]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_progress_of_other_settings_stays(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.progress.jsonl"
    path.write_text('{"settings": {}}\n')
    assert main(["screen", str(run), "--output", str(tmp_path / "out"), *FEW]) == 1
    assert "other settings" in capsys.readouterr().err and path.exists()
