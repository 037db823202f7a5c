"""No file of a stranger's has its code run: canaries in models, crosscoders, caches, checkpoints
and data sets stay alive."""

import json
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, dynamic_module_utils

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.core.tensor_files import checksum, load_state
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.alignment.chat import render_chat
from sae_lens_dfc.data.text.datasets import open_rows
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.training.checkpoint import checkpoints, load_place
from tests.helpers import make_firing_dfc
from tests.model_classes import MODEL_CLASSES
from tests.reliability.hostile import (
    CANARY,
    COMMANDS,
    Pickled,
    canary_module,
    changed_json,
    copied,
    refusal,
    refused,
)


@pytest.fixture(autouse=True)
def nothing_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Whoever is asked whether to run code says yes.
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    yield
    assert not (tmp_path / CANARY).exists()


def with_code(model: Path, to: Path) -> Path:
    """A copy of a model that says it needs the Python that lies beside it."""
    folder = copied(model, to)
    (folder / "modeling_evil.py").write_text(canary_module(to.parent))
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    changed_json(
        folder / "config.json", auto_map=classes, model_type="evil", architectures=["Model"]
    )
    tokenizer = {"AutoTokenizer": ["modeling_evil.Tokenizer", "modeling_evil.Tokenizer"]}
    changed_json(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")
    return folder


def pickled(model: Path, to: Path) -> Path:
    """A copy of a model whose weights are a pickle that runs something."""
    folder = copied(model, to)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Pickled(to.parent)}, folder / "pytorch_model.bin")
    return folder


MODELS: dict[str, Callable[[Path, Path], Path]] = {"code": with_code, "pickle": pickled}


@pytest.mark.parametrize("which", MODELS)
def test_the_canaries_can_sing(
    which: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of this file: transformers runs the code if it is trusted, and torch without
    asking."""
    folder = MODELS[which](llama_folder, tmp_path / "model")
    if which == "code":
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        AutoModelForCausalLM.from_pretrained(folder)
    else:
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    (tmp_path / CANARY).unlink()


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("which", MODELS)
def test_a_models_own_code_is_not_run(
    which: str, model_class: Any, llama_folder: Path, tmp_path: Path
) -> None:
    folder = MODELS[which](llama_folder, tmp_path / "model")
    message = refused(lambda: load_model(ModelConfig(str(folder), model_class_name=model_class)))
    assert "Could not load" in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("which", MODELS)
def test_a_run_that_names_a_model_with_code_runs_nothing(
    which: str,
    command: str,
    run: Path,
    llama_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = copied(run, tmp_path / "run")
    folder = MODELS[which](llama_folder, tmp_path / "model")
    changed_json(theirs / "runner_cfg.json", model_a__model_name=str(folder))
    assert "Could not load" in refusal(capfd, command, theirs, *COMMANDS[command])


ASKS: dict[str, tuple[dict[str, Any], str]] = {
    "of a model": (
        {"model_a__trust_remote_code": True},
        "model_a has a setting 'trust_remote_code'",
    ),
    "of the run": ({"trust_remote_code": True}, "The run has a setting 'trust_remote_code'"),
    "for loading": (
        {"model_a__model_from_pretrained_kwargs": {"trust_remote_code": True}},
        "has a setting 'model_from_pretrained_kwargs'",
    ),
    "in the metadata": (
        {"sae__metadata": {"model_from_pretrained_kwargs": {"trust_remote_code": True}}},
        "A file cannot ask for that",
    ),
    "another class": ({"model_a__model_class_name": "os.system"}, "model_class_name must be"),
    "another architecture": ({"sae__architecture": "os.system"}, "is not registered"),
}


@pytest.mark.parametrize("which", ASKS)
def test_a_run_cannot_ask_for_code_to_be_trusted(
    which: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = copied(run, tmp_path / "run")
    asked, word = ASKS[which]
    changed_json(theirs / "runner_cfg.json", **asked)
    assert word in refusal(capfd, "evaluate", theirs)


def test_a_crosscoder_cannot_ask_for_code_to_be_trusted(tmp_path: Path) -> None:
    make_firing_dfc().save_model(tmp_path / "saved")
    kwargs = {"trust_remote_code": True}
    changed_json(tmp_path / "saved" / "cfg.json", metadata__model_from_pretrained_kwargs=kwargs)
    assert "A file cannot ask for that" in refused(lambda: load_crosscoder(tmp_path / "saved"))


@pytest.mark.slow
def test_a_cache_that_names_a_model_with_code_opens_none(
    run: Path, llama_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = json.loads((run / "runner_cfg.json").read_text())
    args = ["--model-a.model-name", made["model_a"]["model_name"]]
    args += ["--model-b.model-name", made["model_b"]["model_name"]]
    args += ["--dataset-path", made["dataset_path"], "--context-size", "48"]
    cache = tmp_path / "cache"
    assert main(["cache", *args, "--max-unique-pairs", "700", "--cache-path", str(cache)]) == 0
    evil = with_code(llama_folder, tmp_path / "model")
    changed_json(cache / "manifest.json", configs__model_a__model_name=str(evil))
    sizes = ["--sae.d-sae", "64", "--sae.k", "6", "--training-tokens", "640"]
    sizes += ["--train-batch-size-tokens", "64", "--cache-path", str(cache)]
    trained = tmp_path / "run"
    assert main(["train", *sizes, "--output-path", str(trained)]) == 0
    assert "Could not load" in refusal(capfd, "evaluate", trained)
    changed_json(cache / "manifest.json", configs__model_a__trust_remote_code=True)
    refused_to = refusal(capfd, "train", *sizes, "--output-path", tmp_path / "other")
    assert "has a setting 'trust_remote_code'" in refused_to


WEIGHTS = ("sae_weights.safetensors", "runner_cfg.json", "cfg.json", "latents.csv", "metrics.json")


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pickle_in_the_place_of_a_file_is_not_opened(
    name: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = copied(run, tmp_path / "run")
    (theirs / name).write_bytes(pickle.dumps(Pickled(tmp_path)))
    message = refusal(capfd, "report" if name != "latents.csv" else "latents", theirs)
    assert name in message and ("is not" in message or "claims a header" in message)


@pytest.mark.parametrize("name", ["rank-00000", "crosscoder/trainer_state"])
def test_a_pickle_in_the_place_of_a_checkpoint_is_not_opened(
    name: str, run: Path, tmp_path: Path
) -> None:
    *_, last = checkpoints(run.with_name("run-checkpoints"))
    theirs = copied(last, tmp_path / last.name)
    path = theirs / f"{name}.safetensors"
    torch.save(Pickled(tmp_path), path)
    changed_json(theirs / "checksums.json", **{f"{name}.safetensors": checksum(path)})
    assert "claims a header of" in refused(lambda: load_state(path))
    if name == "rank-00000":
        assert "claims a header of" in refused(lambda: load_place(theirs))


@pytest.mark.parametrize("name", ["pandas", "json", "text", "webdataset"])
def test_the_name_of_a_format_does_not_read_what_lies_in_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Pickled(tmp_path)))
    (tmp_path / "train.json").write_text('{"text": "secret"}')
    assert "is the name of a format" in refused(lambda: open_rows(name))


def test_a_data_sets_own_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(canary_module(tmp_path))
    refused(lambda: open_rows(str(folder)))
    (folder / "train.jsonl").write_text('{"text": "sound"}\n')
    assert [row["text"] for row, _ in open_rows(str(folder)).read()] == ["sound"]
    assert not (tmp_path / CANARY).exists()
    runpy.run_path(str(folder / "evil.py"))
    (tmp_path / CANARY).unlink()


def test_a_saved_data_set_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["secret"]}).save_to_disk(tmp_path / "theirs")
    Dataset.from_dict({"text": ["shown"]}).save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "theirs").glob("*.arrow")
    for name in (f"../theirs/{arrow.name}", str(arrow)):
        changed_json(tmp_path / "saved" / "state.json", _data_files=[{"filename": name}])
        assert "leads elsewhere" in refused(lambda: open_rows(str(tmp_path / "saved")))


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{{ messages.append(1) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(
    template: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model(ModelConfig(str(llama_folder), chat_template=template))
    chat = [{"role": "user", "content": "hi"}]
    assert "is unsafe" in refused(lambda: render_chat(model.tokenizer, chat))
