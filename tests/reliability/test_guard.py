"""Opening a model starts no process and runs no code: a canary in the place of pip and uv, and one
in the model's folder."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    dynamic_module_utils,
)
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.opening.guard import NotAllowed, reading_only
from tests.reliability.hostile import CANARY, canary_module, changed_json, copied

PYTHON = [sys.executable, "-c", "pass"]
WAYS: dict[str, Callable[[], Any]] = {
    "subprocess.run": lambda: subprocess.run(PYTHON, check=False),
    "subprocess.check_call of a shell": lambda: subprocess.check_call("true", shell=True),
    "os.system": lambda: os.system("true"),
    "os.posix_spawn": lambda: os.posix_spawn(sys.executable, PYTHON, os.environ),
    "os.fork": os.fork,
    "os.execv": lambda: os.execv(sys.executable, PYTHON),
    "os.spawnv": lambda: os.spawnv(os.P_WAIT, sys.executable, PYTHON),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_start_a_process_works_while_a_model_is_opened(way: str) -> None:
    with reading_only(), pytest.raises(NotAllowed, match="may not start a process"):
        WAYS[way]()


def test_a_compiler_may_start_and_a_program_of_a_name_like_it_may_not(tmp_path: Path) -> None:
    for name in ("x86_64-linux-gnu-gcc", "notgcc"):
        (tmp_path / name).symlink_to(shutil.which("true") or "/bin/true")
    with reading_only():
        assert subprocess.run([tmp_path / "x86_64-linux-gnu-gcc"], check=False).returncode == 0
        with pytest.raises(NotAllowed, match=r"may not start a process \(notgcc\)"):
            subprocess.run([tmp_path / "notgcc"], check=False)


def test_processes_start_again_afterwards_and_in_other_threads_all_the_time() -> None:
    statuses: list[int] = []
    with reading_only():
        with reading_only():
            pass
        other = threading.Thread(target=lambda: statuses.append(os.system("true")))
        other.start()
        other.join()
        with pytest.raises(NotAllowed):
            os.system("true")
    statuses.append(os.system("true"))
    assert statuses == [0, 0]


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands on the path as pip and uv, and leaves a file behind when it is called."""
    folder, sang = tmp_path / "bin", tmp_path / "installed"
    folder.mkdir()
    for name in ("uv", "pip", "python", Path(sys.executable).name):
        (folder / name).write_text(f"#!/bin/sh\necho $0 $@ >> {sang}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # Where torchvision is installed, nothing would be asked for.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return sang


@pytest.fixture
def multimodal(llama_folder: Path, tmp_path: Path) -> Path:
    """A tiny Gemma 3 that sees pictures, without the files of its image processor."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    folder = tmp_path / "multimodal"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_installer_would_be_called(multimodal: Path, installer: Path) -> None:
    """What the next test shows rests on it: TransformerLens, left to itself, calls it."""
    tokenizer = AutoTokenizer.from_pretrained(multimodal)
    model = AutoModelForCausalLM.from_pretrained(multimodal, attn_implementation="eager")
    TransformerBridge.boot_transformers(
        str(multimodal), hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    assert "install torchvision" in installer.read_text()


def test_a_multimodal_models_text_part_opens_and_nothing_is_installed(
    multimodal: Path, installer: Path
) -> None:
    model = load_model(ModelConfig(str(multimodal)))
    assert not installer.exists()
    ids = torch.tensor([[0, 11, 12, 13]])
    hf = AutoModelForCausalLM.from_pretrained(multimodal, attn_implementation="eager")
    # hidden_states[0] is the embedding, so block 0's output is [1].
    expected = hf(ids, output_hidden_states=True).hidden_states[1]
    model.hook_name = "blocks.0.hook_resid_post"
    assert torch.equal(model.activations(ids, torch.ones_like(ids)), expected)


@pytest.fixture
def modules_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Downloaded code goes into a folder of the test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def claims_rwkv(llama_folder: Path, tmp_path: Path) -> Path:
    """A Llama whose config.json names an architecture for which TransformerLens runs code from the
    folder."""
    folder = copied(llama_folder, tmp_path / "claims")
    changed_json(folder / "config.json", architectures=["RWKV7ForCausalLM"])
    (folder / "modeling_rwkv7.py").write_text(canary_module(tmp_path))
    return folder


@pytest.mark.usefixtures("modules_in")
def test_the_architecture_that_a_file_claims_would_run_its_code(
    claims_rwkv: Path, tmp_path: Path
) -> None:
    """What the next test shows rests on it."""
    model = AutoModelForCausalLM.from_pretrained(claims_rwkv)
    tokenizer = AutoTokenizer.from_pretrained(claims_rwkv)
    with pytest.raises(Exception, match="."):
        TransformerBridge.boot_transformers(
            str(claims_rwkv), hf_model=model, tokenizer=tokenizer, device="cpu"
        )
    assert (tmp_path / CANARY).exists()


@pytest.mark.usefixtures("modules_in")
def test_a_model_is_opened_as_what_it_is_whatever_its_file_claims(
    claims_rwkv: Path, llama_folder: Path, tmp_path: Path
) -> None:
    opened = load_model(ModelConfig(str(claims_rwkv)))
    assert not (tmp_path / CANARY).exists()
    plain = load_model(ModelConfig(str(llama_folder)))
    assert opened.describe() == plain.describe() | {"model_name": "claims"}


KERNELS = """
from unittest.mock import MagicMock
def _as_it_is(*_): return lambda decorated: decorated
use_kernel_forward_from_hub = use_kernelized_func = _as_it_is
def __getattr__(name): return MagicMock()
"""
"""What transformers imports of the package `kernels`, with which it downloads compiled code."""


@pytest.mark.slow
def test_no_kernels_are_fetched_from_the_hub_but_for_who_asks_for_them(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    about = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = "import sae_lens_dfc; from transformers.integrations import hub_kernels as hub; print(hub._kernels_enabled)"
    plain = {key: value for key, value in os.environ.items() if key != "USE_HUB_KERNELS"}
    plain["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    # transformers reads it once, so each value takes a process of its own.
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for env in (plain, {**plain, "USE_HUB_KERNELS": "YES"})
    ]
    assert [child.communicate()[0].strip() for child in children] == ["False", "True"]


@pytest.mark.usefixtures("modules_in")
def test_downloaded_code_is_not_run_whoever_asks_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_evil.py").write_text(canary_module(tmp_path))
    ask = dynamic_module_utils.get_class_from_dynamic_module
    with reading_only(), pytest.raises(NotAllowed, match="may not run code that comes with it"):
        ask("modeling_evil.Model", str(folder))
    assert not (tmp_path / CANARY).exists()
    shutil.rmtree(tmp_path / "modules")
    ask("modeling_evil.Model", str(folder))  # the canary can sing
    assert (tmp_path / CANARY).exists()
