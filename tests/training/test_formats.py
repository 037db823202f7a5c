"""A run goes on in the number formats that it was begun in, on a processor where `auto` would
choose others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.cache import writer
from tests.helpers import processor, write_pages

pytestmark = pytest.mark.usefixtures("measured_anew")

FAST, SLOW = 0.5, 58.0
AUTO = ("--model-a.dtype", "auto", "--model-b.dtype", "auto")
BOTH_WAYS = pytest.mark.parametrize(
    ("begun", "resumed", "stays", "said"),
    [
        (
            *(FAST, SLOW, "bfloat16"),
            "auto would choose float32 on cpu, where bfloat16 takes 58.0 times as long",
        ),
        (
            *(SLOW, FAST, "float32"),
            "auto would choose bfloat16 on cpu, where float32 takes 2.0 times as long",
        ),
    ],
    ids=["bfloat16", "float32"],
)


@pytest.fixture
def data(tmp_path: Path, llama_folder: Path, gpt2_folder: Path) -> list[str]:
    """Flags that name two models in the formats that `auto` chooses, and a text."""
    text = tmp_path / "text.jsonl"
    write_pages(text, 6)
    models = ("--model-a.model-name", str(llama_folder), "--model-b.model-name", str(gpt2_folder))
    sizes = ("--eval-every-n-documents", "3", "--context-size", "48", "--max-unique-pairs", "600")
    return [*models, *AUTO, "--dataset-path", str(text), *sizes]


@pytest.fixture
def train(data: list[str]) -> Callable[..., int]:
    sizes = "--training-tokens 512 --train-batch-size-tokens 64 --lr 3e-3 --sae.d-sae 64 --sae.k 6"

    def train(run: Path, *flags: str) -> int:
        of_run = ("--output-path", str(run), "--autocast", "auto")
        return main(["train", *data, *sizes.split(), *of_run, *flags])

    return train


class KilledError(Exception):
    """Stands in for a kill."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, train: Callable[[], int]) -> None:
    made = SAETrainer.step

    def step_or_die(self: Any, batch: Any) -> Any:
        if self.n_training_steps == step:
            raise KilledError
        return made(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(SAETrainer, "step", step_or_die)
        train()


def settings(run: Path) -> dict[str, Any]:
    return json.loads((run / "runner_cfg.json").read_text())


def of_formats(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of number formats since the last call."""
    words = ("stays in", "times slower", "Models run in")
    found = [m for m in caplog.messages if any(word in m for word in words)]
    caplog.clear()
    return found


@pytest.mark.slow
@BOTH_WAYS
def test_a_training_that_auto_began_ends_as_it_would_have_on_the_processor_that_began_it(
    begun: float,
    resumed: float,
    stays: str,
    said: str,
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    processor(monkeypatch, begun)
    assert train(whole) == 0
    killed_at(5, monkeypatch, lambda: train(run))
    processor(monkeypatch, resumed)
    of_formats(caplog)
    assert train(run, "--resume") == 0
    line = f"The training was begun in {stays} and stays in it: {said}"
    assert of_formats(caplog) == [line]
    for file in ("sae_weights.safetensors", "cfg.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    formats = [settings(run)[model]["dtype"] for model in ("model_a", "model_b")]
    assert formats == [stays, stays] and settings(run)["autocast"] == (stays == "bfloat16")
    # That it is finished is found too.
    assert train(run, "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    line = f"Run {run} was begun in {stays} and stays in it: {said}"
    for command in ("evaluate", "report"):
        processor(monkeypatch, resumed)
        of_formats(caplog)
        assert main([command, str(run), "--eval-pairs", "60"]) == 0
        assert of_formats(caplog) == [line]
    processor(monkeypatch, begun)
    assert main(["evaluate", str(run), "--eval-pairs", "60"]) == 0
    assert of_formats(caplog) == []


@pytest.mark.slow
@BOTH_WAYS
def test_another_format_by_name_is_refused_with_both(
    begun: float,
    resumed: float,
    stays: str,
    said: str,
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processor(monkeypatch, begun)
    killed_at(3, monkeypatch, lambda: train(tmp_path / "run"))
    processor(monkeypatch, resumed)
    other = "float32" if stays == "bfloat16" else "bfloat16"
    asked = {
        "model_a.dtype": (("--model-a.dtype", other), stays, other),
        "autocast": (
            ("--autocast", str(stays != "bfloat16")),
            stays == "bfloat16",
            stays != "bfloat16",
        ),
    }
    for name, (flags, was, now) in asked.items():
        assert train(tmp_path / "run", "--resume", *flags) == 1
        assert f"another training: {name} was {was!r} and is {now!r}" in capsys.readouterr().err
    assert "auto would choose" in said


@pytest.mark.slow
@BOTH_WAYS
def test_a_cache_that_auto_began_goes_on_with_the_same_bytes_and_is_trained_on(
    begun: float,
    resumed: float,
    stays: str,
    said: str,
    data: list[str],
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cache(name: str, *flags: str) -> int:
        return main(
            ["cache", *data, "--shard-rows", "64", "--cache-path", str(tmp_path / name), *flags]
        )

    written: list[Path] = []
    made = writer._write_shard

    def write_or_fail(path: Path, columns: Any) -> Any:
        written.append(path)
        if len(written) == 4:
            raise OSError("No space left on device")
        return made(path, columns)

    processor(monkeypatch, begun)
    assert cache("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", write_or_fail)
        assert cache("cache") == 1
    processor(monkeypatch, resumed)
    line = f"The cache was begun in {stays} and stays in it: {said}"
    # Once as it goes on, once as it is found to be whole.
    for _ in range(2):
        of_formats(caplog)
        assert cache("cache", "--resume") == 0
        assert of_formats(caplog) == [line]
    shards = [
        json.loads((tmp_path / x / "manifest.json").read_text())["shards"]
        for x in ("cache", "whole")
    ]
    assert shards[0] == shards[1] and len(shards[0]) > 4
    # A training on it runs no model: nothing is to be said of their formats.
    processor(monkeypatch, resumed)
    assert train(tmp_path / "run", "--cache-path", str(tmp_path / "cache")) == 0
    assert of_formats(caplog) == []
    assert settings(tmp_path / "run")["model_b"]["dtype"] == stays
