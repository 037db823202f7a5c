"""Files of a model that are missing, damaged or only pointers are named, with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.models.opening.model_files import check_model_file, check_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_model(ModelConfig(str(folder)))
    assert "Give a hub name" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named_as_one(folder: Path, file: str) -> None:
    (folder / file).write_text(POINTER)
    assert f"{file} is a pointer of git LFS, not the file itself: run `git lfs pull`" in refusal(
        folder
    )


@pytest.mark.parametrize("n_left", [0, 5, 1000])
def test_weights_that_are_cut_short_are_to_be_copied_again(folder: Path, n_left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_left])
    said = refusal(folder)
    assert "model.safetensors is " in said and said.endswith("Copy the file again.")


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    said = refusal(folder)
    assert "1 of its 2 files" in said and "'model-00002-of-00002.safetensors'" in said


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "pointer of git LFS"), ("", "is empty. Copy")]
)
def test_a_gguf_file_that_is_not_there_is_told_too(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "m.gguf").write_text(content)
    assert f"m.gguf {said}" in refusal(tmp_path / "m.gguf").replace("is a pointer", "pointer")


def test_files_that_are_not_read_may_be_in_any_state(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "training_args.bin").touch()
    check_weights(folder)


def test_a_file_of_torch_that_is_cut_short_is_told_from_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"x": torch.rand(100)}, path)
    check_model_file(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is cut short. Copy the file again."):
        check_model_file(path)
