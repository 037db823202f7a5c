"""The step benchmark at tiny sizes, its memory reader, and the reference's adapter on a fake
checkout."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.options import StepConfig
from benchmarks.peers.dfc_learning import load_reference, reference_step
from benchmarks.peers.dictionary_learning import (
    DictionaryLearning,
    dictionary_learning_step,
    load_dictionary_learning,
    missing,
)
from benchmarks.step import run_step_benchmark, targets, with_ratios
from sae_lens_dfc.training.preflight import peak_memory
from sae_lens_dfc.training.preflight.peak_memory import with_peak_memory

SIZES = {"--d-a": 8, "--d-b": 8, "--d-sae": 64, "--k": 4, "--batch": 32, "--rounds": 2}
RATIOS = {
    "ratio_to_encoder_product": ("step_ms", "encoder_product_ms"),
    "speedup_over_saelens": ("saelens_ms", "step_ms"),
    "speedup_over_reference": ("reference_ms", "step_ms"),
    "speedup_over_dictionary_learning": ("dictionary_learning_ms", "step_ms"),
}
CPU = torch.device("cpu")

# In the layout of github.com/superkaiba/dfc_learning.
FAKE = {
    "__init__.py": "from .dictionary import DedicatedFeatureBatchTopKCrossCoder",
    "dictionary.py": """
import torch.nn as nn
import no_such_package.plots as plots
from .buffer import Buffer

class DedicatedFeatureBatchTopKCrossCoder(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.settings = args, kwargs
""",
    "buffer.py": """
from no_such_package import LanguageModel
import also_not_there as missing

class Buffer(missing.Base):
    model: LanguageModel | None = None
""",
    "trainers/__init__.py": "from .crosscoder import BatchTopKCrossCoderTrainer",
    "trainers/crosscoder.py": """
class BatchTopKCrossCoderTrainer:
    def __init__(self, steps, activation_dim, dict_size, k, layer, lm_name, dict_class, dict_class_kwargs, device):
        self.ae = dict_class(activation_dim, dict_size, 2, k, **dict_class_kwargs)

    def update(self, step, x):
        assert step > 1000 and x.abs().sum() > 0
        shape = x.shape
        x.zero_()  # it normalizes in place
        return step, shape, self.ae.settings
""",
}


class FakeTrainer:
    """In the place of dictionary-learning's."""

    def __init__(self, **settings: Any):
        self.sizes = tuple(settings[name] for name in ("activation_dim", "dict_size", "k"))

    def update(self, step: int, x: torch.Tensor) -> None:
        assert step > 1000 and self.sizes == (16, 64, 4) and x.shape == (32, 16)
        assert x.abs().sum() > 0
        x.zero_()


@pytest.fixture
def dictionary_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, as if it were installed."""
    package = DictionaryLearning(lambda *_: None, FakeTrainer)
    monkeypatch.setattr(step, "missing", lambda: None)
    monkeypatch.setattr(step, "load_dictionary_learning", lambda: package)
    monkeypatch.setattr(step, "DISTRIBUTION", "torch")  # of which there is a version


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "checkout" / "dictionary_learning"
    (package / "trainers").mkdir(parents=True)
    for name, code in FAKE.items():
        (package / name).write_text(code)
    return package.parent


def run(output: Path, **extra: Any) -> int:
    flags = SIZES | {f"--{name.replace('_', '-')}": value for name, value in extra.items()}
    args = [str(part) for flag in flags.items() for part in flag]
    return main(["step", *args, "--output", str(output)])


@pytest.mark.slow
@pytest.mark.usefixtures("dictionary_learning")
def test_every_figure_is_written_and_printed_with_its_range(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", reference=checkout) == 0
    written = json.loads((tmp_path / "out" / "step.json").read_text())
    out = capsys.readouterr().out
    times = {name for ratio in RATIOS.values() for name in ratio} | {"step_ms_tenth_dead"}
    assert set(written["spread"]) == times | set(RATIOS)
    for name, (low, high) in written["spread"].items():
        assert 0 < low <= written[name] <= high
        assert f"{written[name]:.3f}" in out and f"{low:.3f} to {high:.3f}" in out
    # What is asked for is asked at other sizes.
    assert "<=" not in out and written["targets"] == {}
    assert {"commit", "machine", "versions", "settings"} <= set(written)
    assert written["sizes"] == {"d_a": 8, "d_b": 8, "d_sae": 64, "k": 4, "batch": 32}
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["step.json", "step.md", "step.svg"]
    assert len(written["rounds"]) == 2 and set(written["rounds"][0]) == set(written["spread"])


@pytest.mark.slow
@pytest.mark.usefixtures("dictionary_learning")
def test_of_one_round_each_ratio_is_the_quotient_of_two_figures(
    checkout: Path, tmp_path: Path
) -> None:
    assert run(tmp_path, rounds=1, reference=checkout) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    for name, (above, below) in RATIOS.items():
        assert written[name] == pytest.approx(written[above] / written[below])
    # 2 x 16 x 64 weights and 64 + 16 biases; four float32 copies of them, and 32 x 64 latents of
    # two bytes.
    if written["peak_memory_bytes"] is not None:
        least = 16 * (2 * 16 * 64 + 64 + 16) + 2 * 32 * 64
        assert written["peak_memory_ratio"] == written["peak_memory_bytes"] / least


@pytest.mark.slow
def test_without_other_trainers_their_figures_are_null_and_output_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step, "missing", lambda: "not installed: install it")
    (tmp_path / "step.json").write_text("of another run")
    assert run(tmp_path, rounds=1) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["reference_ms"] is None and written["speedup_over_reference"] is None
    assert written["reference_commit"] is None and written["step_ms"] > 0
    assert written["dictionary_learning_ms"] is None
    assert written["speedup_over_dictionary_learning"] is None
    assert "dictionary-learning is left out: not installed: install it" in caplog.text


@pytest.mark.slow
def test_the_references_commit_is_that_of_its_own_repository(
    checkout: Path, tmp_path: Path
) -> None:
    def git(*args: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(checkout), *author, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "Fake")
    assert run(tmp_path / "out", rounds=1, reference=checkout) == 0
    written = json.loads((tmp_path / "out" / "step.json").read_text())
    assert written["reference_commit"] == git("rev-parse", "HEAD") != written["commit"]


@pytest.mark.slow
def test_a_tenth_of_the_latents_is_dead_in_that_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: list[int] = []
    make = step._ours

    def watched(cfg: StepConfig) -> Any:
        trainer = make(cfg)
        original: Callable[[torch.Tensor], Any] = trainer.step

        def counted(batch: torch.Tensor) -> Any:
            dead.append(int(trainer.dead_neurons.sum()))
            return original(batch)

        trainer.step = counted  # type: ignore[method-assign]
        return trainer

    monkeypatch.setattr(step, "_ours", watched)
    run_step_benchmark(StepConfig(d_a=8, d_b=8, d_sae=64, k=4, batch=32, rounds=2), tmp_path)
    # Two of either kind to load libraries, two for memory and two to warm up; then five in each
    # round.
    assert dead == 4 * [0, 7] + [0, 0, 7, 7] + 2 * ([0] * 5 + [7] * 5)


def test_sizes_of_a_step_are_not_taken_by_another_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["recovery", "--d-sae", "99", "--k", "3", "--output", str(tmp_path / "out")]
    assert main(args) == 1
    assert "d_sae, k: for `step`, not for recovery." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_is_asked_at_the_sizes_it_was_set_for() -> None:
    asked = [targets(StepConfig(d_sae=d_sae, dtype="bfloat16")) for d_sae in (8192, 32768)]
    assert asked[0] == asked[1] and asked[0]["ratio_to_encoder_product"] == "<= 1.35"
    assert targets(StepConfig(batch=512)) == targets(StepConfig(d_sae=4096)) == {}


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_step_of_the_installed_package_trains_on_the_joined_input() -> None:
    next_step = dictionary_learning_step(load_dictionary_learning(), 16, 64, 4, "cpu")
    batch = torch.randn(32, 16)
    losses = [next_step(batch.clone()) for _ in range(3)]
    # Its learning rate rises from 0.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)


def test_ratios_of_a_round_leave_out_the_reference_that_was_not_timed() -> None:
    ms = {"step_ms": 2.0, "encoder_product_ms": 1.0, "saelens_ms": 6.0}
    ratios = {"ratio_to_encoder_product": 2.0, "speedup_over_saelens": 3.0}
    assert with_ratios(ms) == {**ms, **ratios}
    assert with_ratios({**ms, "reference_ms": 1.0})["speedup_over_reference"] == 0.5


# --- memory ---


@pytest.mark.slow
@pytest.mark.skipif(not peak_memory.CLEAR_REFS.exists(), reason="this system has no /proc")
def test_the_peak_is_seen_though_it_was_freed_and_is_forgotten_afterwards() -> None:
    n_bytes = 200_000_000

    def allocate_and_free() -> int:
        return len(torch.ones(n_bytes, dtype=torch.uint8))

    result, peak = with_peak_memory(allocate_and_free, CPU)
    assert result == n_bytes
    # The kernel counts pages by thread and adds them up now and then.
    assert peak is not None and 0.98 * n_bytes <= peak < 1.2 * n_bytes
    _, later = with_peak_memory(lambda: None, CPU)
    assert later is not None and later < 0.1 * n_bytes


@pytest.mark.slow
def test_where_the_system_does_not_tell_memory_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak_memory, "CLEAR_REFS", tmp_path / "none")
    assert with_peak_memory(lambda: 3, CPU) == (3, None)
    assert run(tmp_path, rounds=1) == 0
    assert json.loads((tmp_path / "step.json").read_text())["peak_memory_ratio"] is None


# --- the reference ---


def test_the_reference_is_imported_without_what_it_does_not_need_and_leaves_no_trace(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ModuleType("dictionary_learning")
    monkeypatch.setitem(sys.modules, "dictionary_learning", installed)
    path = list(sys.path)
    reference = load_reference(checkout)
    assert sys.path == path
    assert sys.modules["dictionary_learning"] is installed
    names = {name.partition(".")[0] for name in sys.modules}
    assert not names & {"no_such_package", "also_not_there"}
    assert "dictionary_learning.trainers.crosscoder" not in sys.modules
    next_step = reference_step(reference, 8, 64, 4, (0.05, 0.1), "cpu")
    settings = (8, 64, 2, 4), {"model_a_exclusive_pct": 0.05, "model_b_exclusive_pct": 0.1}
    batch = torch.ones(32, 2, 8)
    assert next_step(batch) == (2000, batch.shape, settings)
    assert next_step(torch.ones(32, 2, 8))[0] == 2001


def test_a_reference_that_cannot_be_imported_leaves_no_trace_either(checkout: Path) -> None:
    (checkout / "dictionary_learning" / "dictionary.py").write_text("import no_such_package\n1 / 0")
    with pytest.raises(ValueError, match="could not be imported: ZeroDivisionError: division"):
        load_reference(checkout)
    assert not {"no_such_package", "dictionary_learning"} & set(sys.modules)
    assert str(checkout) not in sys.path


def test_a_checkout_of_something_else_is_refused(checkout: Path) -> None:
    (checkout / "dictionary_learning" / "trainers" / "crosscoder.py").write_text("X = 1")
    (checkout / "dictionary_learning" / "trainers" / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="has no attribute 'BatchTopKCrossCoderTrainer'"):
        load_reference(checkout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": 65}, "k must be above 0 and at most d_sae, got k=65 and d_sae=64"),
        ({"batch": 0}, "batch must be above 0, got 0"),
        ({"rounds": 0}, "rounds must be above 0, got 0"),
        ({"device": "meadow"}, "device 'meadow' is not available: "),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available: "),
        ({"reference": "."}, "is not a checkout of github.com/superkaiba/dfc_learning: it has no"),
        ({"reference": ".", "d_b": 9}, "needs models of equal width, got d_a=8 and d_b=9"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", **flags) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line and captured.out == ""
    assert list(tmp_path.iterdir()) == []
