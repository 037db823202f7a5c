"""One small job of each kind, as the command line does it, with all that it needs."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_lens_dfc.cli.main import main
from tests.helpers import train_tiny, write_pages


@dataclass
class Jobs:
    """Arguments of each command, for a place to write to.

    Args:
        settings: A configuration of two models and a text.
        run: A trained crosscoder of these.
        cache: A cache of these.
    """

    settings: Path
    run: Path
    cache: Path

    def of(self, name: str, output: Path) -> list[str]:
        """The command that writes into `output`, or goes on with what is there."""
        config = ("--config", str(self.settings))
        measuring = ("--fit-pairs", "400", "--texts", "3", "--controls", "2", "--keep", "4")
        lines: dict[str, list[str]] = {
            "cache": ["cache", *config, "--cache-path", str(output), "--resume"],
            "train": ["train", *config, "--output-path", str(output), "--resume"],
            "train on a cache": [
                *("train", "--cache-path", str(self.cache), "--output-path", str(output)),
                *(
                    "--training-tokens",
                    "12800",
                    "--train-batch-size-tokens",
                    "64",
                    "--sae.d-sae",
                    "64",
                ),
                *("--sae.k", "4", "--n-checkpoints", "8", "--resume"),
            ],
            "evaluate": [
                *("evaluate", str(self.run), "--output", str(output), "--overwrite"),
                *("--null", "shuffle", "--downstream-pairs", "200", "--behavior-latents", "1"),
            ],
            "screen": ["screen", str(self.run), "--output", str(output), *measuring],
            "export": ["export", str(self.run), "--model", "a", "--output", str(output)],
        }
        return lines[name]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    text = folder / "text.jsonl"
    write_pages(text, 12)
    settings = {
        "model_a": {"model_name": str(llama_folder)},
        "model_b": {"model_name": str(gpt2_folder)},
        "dataset_path": str(text),
        "eval_every_n_documents": 4,
        "context_size": 48,
        "max_unique_pairs": 6_000,
        "cache_dtype": "float32",
        "shard_rows": 256,
        "training_tokens": 64 * 200,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 8,
        "n_checkpoints": 8,
        "sae": {"d_sae": 64, "k": 4, "a_exclusive_fraction": 0.2, "b_exclusive_fraction": 0.2},
    }
    (folder / "settings.yaml").write_text(json.dumps(settings))
    run = train_tiny(folder, llama_folder, gpt2_folder)
    jobs = Jobs(folder / "settings.yaml", run, folder / "cache")
    assert main(jobs.of("cache", jobs.cache)) == 0
    return jobs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    """A small trained crosscoder with two checkpoints, for strangers to change copies of."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--max-unique-pairs", "800", "--training-tokens", "1600", "--n-checkpoints", "2")
    return train_tiny(folder, llama_folder, gpt2_folder, *flags, n_texts=4)
