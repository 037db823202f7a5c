"""What a reader can copy runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from sae_lens_dfc.__main__ import TAKE_RECIPES, _parser, main
from sae_lens_dfc.arguments import parsed_with_lists, with_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def substituted(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"README no longer says {old!r}"
        text = text.replace(old, new)
    return text


def test_the_python_example_trains_and_saves_a_crosscoder(
    llama_folder: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    code, _ = PYTHON
    small = {
        "Qwen/Qwen3-0.6B": str(llama_folder),
        "google/gemma-3-270m": str(gpt2_folder),
        "blocks.14.": "blocks.1.",
        "blocks.9.": "blocks.0.",
        "roneneldan/TinyStories": "cpython-docs",
        "training_tokens=2_000_000": "training_tokens=5_120, training_pairs=3_000, train_batch_size_tokens=512",
        "d_sae=2048, k=32": "d_sae=64, k=4",
        "runs/qwen-gemma": str(tmp_path / "run"),
    }
    exec(compile(substituted(code, small), "README.md", "exec"), {})
    assert SAE.load_from_disk(tmp_path / "run").cfg.d_sae == 64


def test_the_recipe_in_the_readme_is_a_configuration() -> None:
    _, code = PYTHON
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["cfg"].sae.d_sae == 131_072


def test_every_command_in_the_readme_is_a_command_with_those_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = re.findall(r"sae-lens-dfc (\w+)([^`|\n]*)", README)
    assert commands
    for command, rest in commands:
        # An architecture's own flags are there with it alone.
        architecture = re.findall(r"--architecture \w+", rest)
        with pytest.raises(SystemExit) as exit_:
            main([command, *" ".join(architecture).split(), "--help"])
        assert exit_.value.code == 0
        usage = capsys.readouterr().out
        for flag in re.findall(r"--[\w.-]+", rest):
            assert flag in usage, f"{command} has no {flag}"


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


def test_files_the_readme_points_to_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_file_in_the_data_guide_serves_cache_and_train(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(block.replace("device: cuda:2\n", ""))

    def options(command: str) -> Any:
        arguments = with_files([command, "--config", str(tmp_path / "run.yaml")], TAKE_RECIPES)
        return parsed_with_lists(arguments, lambda flags: _parser().parse_args(flags)).options

    cache, train = options("cache"), options("train")
    assert cache.cache_path == train.cache_path == "/data/llama-qwen"
    assert [source.weight for source in cache.sources] == [
        0.5,
        0.5,
    ] and cache.model_a.drop_unused_layers
    assert [sae.architecture() for sae in train.all_saes] == ["dfc", "dfc", "batchtopk_crosscoder"]
    assert [sae.n_a_exclusive for sae in train.all_saes] == [6553, 13107, 0]
