"""`sae-lens-dfc screen RUN`: its rules by hand, and the whole of it on two tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_dfc.analysis.latents.max_activating import FiringPosition
from sae_lens_dfc.analysis.report.findings import EffectView
from sae_lens_dfc.analysis.screening import screen as screen_module
from sae_lens_dfc.analysis.screening.candidates import source_of, windows
from sae_lens_dfc.analysis.screening.verdicts import (
    CONFIRMED,
    NOT_CONFIRMED,
    PARTIAL,
    UNTESTED,
    CausalTest,
    Explained,
    findings,
    verdict_stage,
)
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.pair import ModelPair
from tests.helpers import batches_of, make_firing_dfc, train_tiny


def result(
    ablated: float = 0.2,
    patched: float = 0.1,
    p: tuple[float, float] = (0.001, 0.001),
    beyond: tuple[bool, bool] = (True, True),
) -> CausalTest:
    effects = [EffectView("ablated", ablated, 0, 1, {}), EffectView("patched", patched, 0, 1, {})]
    return CausalTest("b", 8, 0.4, effects, *p, *beyond, samples=[])


def verdicts(results: dict[int, CausalTest | None]) -> list[tuple[int, str]]:
    crosscoder, none = make_firing_dfc(), torch.zeros(24, dtype=torch.bool)
    found = findings(crosscoder, list(results), results, {}, none)
    assert [one.rank for one in found] == list(range(1, len(found) + 1))
    return [(one.latent, one.verdict) for one in found]


def test_a_verdict_needs_both_ways_beyond_their_controls() -> None:
    assert verdicts(
        {
            1: result(beyond=(True, False)),
            2: result(beyond=(False, False)),
            3: None,
            4: result(),
            5: result(ablated=0.3),
            6: result(p=(0.001, 0.2)),
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
    alone = verdicts({1: result(p=(0.04, 0.04))})
    among = verdicts({1: result(p=(0.04, 0.04)), **{i: result(p=(0.9, 0.9)) for i in range(2, 9)}})
    assert alone == [(1, CONFIRMED)] and among[0] == (1, NOT_CONFIRMED)


def test_what_is_left_out_is_counted() -> None:
    crosscoder, none = make_firing_dfc(), torch.zeros(24, dtype=torch.bool)
    results = {1: result(), 2: result(beyond=(False, False)), 3: None}
    found = findings(crosscoder, [1, 2, 3], results, {1: Explained("cats", 0.9, ["x"])}, none)
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


FEW = ("--keep", "4", "--texts", "4", "--controls", "2")


def test_a_screening_writes_its_report_and_goes_on_where_it_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify, calls = screen_module.verify, list[int]()

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return verify(*args, **kwargs)

    output = tmp_path / "out"
    args = ["screen", str(run), "--output", str(output), *FEW]
    monkeypatch.setattr(screen_module, "verify", stopping)
    assert main(args) not in (0, 1)
    assert not output.exists() and (tmp_path / "out.progress.jsonl").exists()
    monkeypatch.setattr(screen_module, "verify", verify)
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
    tested = [one for one in found if one["verdict"] != UNTESTED]
    assert tested
    for one in tested:
        assert len(one["effects"]) >= 2 and len(one["samples"]) == 4
        assert all(
            set(e["controls"]) == {"random directions", "shared latents"}
            for e in one["effects"][:2]
        )
    page = (output / "report.html").read_text()
    assert f"#latent-{found[0]['latent']}" in page and found[0]["verdict"] in page


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
    monkeypatch.setattr(screen_module, "verify", None)
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


def test_progress_of_other_settings_stays(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.progress.jsonl"
    path.write_text('{"settings": {}}\n')
    assert main(["screen", str(run), "--output", str(tmp_path / "out"), *FEW]) == 1
    assert "other settings" in capsys.readouterr().err and path.exists()
