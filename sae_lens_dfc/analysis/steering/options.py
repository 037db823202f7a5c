"""Defines the sampling options and the options of `generate`. `--help` imports this file without
any model."""

from dataclasses import dataclass, field
from pathlib import Path

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.schema import check_seed, require
from sae_lens_dfc.models.config import ModelConfig


@dataclass(kw_only=True)
class Sampling:
    """Sampling options.

    Raises:
        ValueError: A number is out of its range.
    """

    max_new_tokens: int = 128
    """Maximum length of an answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely tokens with this total probability; 1 keeps
    all."""
    batch_size: int = 16
    """Prompts per batch; HookedTransformer always uses 1."""

    def __post_init__(self) -> None:
        require(self, ("max_new_tokens", "batch_size"), "at least 1")
        require(self, ("temperature",), "at least 0 and finite")
        require(self, ("top_p",), "above 0 and at most 1")


@dataclass(kw_only=True)
class GenerateOptions(Sampling):
    """Write both models' answers to each prompt of a data set, as text to train a delta crosscoder
    on.

    Raises:
        ValueError: A number is out of its range, or the output is not a .jsonl file.
    """

    prompts: str
    """Prompts: a file (.txt with one prompt per line, .jsonl, .json, .csv, .parquet), a hub name,
    or a folder written by save_to_disk."""
    output: str
    """Output file, .jsonl: one line per prompt, with prompt, completion_a and completion_b."""
    model_a: ModelConfig = field(default_factory=ModelConfig)
    """The first model."""
    model_b: ModelConfig = field(default_factory=ModelConfig)
    """The second model."""
    text_column: str = "prompt"
    """Column that holds the prompts."""
    n_prompts: int | None = None
    """Maximum number of prompts. If None: all."""
    seed: int = 42
    """Sampling seed; the same seed and batch size give the same answers."""
    overwrite: bool = switch()
    """Overwrite the output file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("n_prompts",), "at least 1")
        if Path(self.output).suffix != ".jsonl":
            raise ValueError(f"output must be a .jsonl file, got {self.output!r}. Name one.")
        check_seed(self.seed)
