"""Defines the options of `demo`. `--help` imports this file without any model."""

from dataclasses import dataclass

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.data.config import CPYTHON_DOCS
from sae_lens_dfc.models.config import AUTO


@dataclass
class DemoConfig:
    """Train and evaluate a crosscoder to find differences between two models; by default on two
    small models that need no hub access."""

    model_a: str | None = None
    """Hub name, folder or .gguf file of the first model. If None: the base model if the second is
    an adapter, otherwise SmolLM2-135M-Instruct from the package index."""
    model_b: str | None = None
    """The second model, or a PEFT adapter. If None: Gemma-3-270M from the package index."""
    base_b: str | None = None
    """Base model to merge an adapter given as second model into. If None: the base named in the
    adapter's configuration."""
    hook_a: str | None = None
    """Hook of the first model. If None: the output of its middle block."""
    hook_b: str | None = None
    """Hook of the second model. If None: the output of its middle block."""
    dataset: str = CPYTHON_DOCS
    """Training text: hub name, file, folder, or cpython-docs, which ships with Python."""
    text_column: str = "text"
    """Column that holds the text."""
    d_sae: int = 2048
    """Dictionary size: number of latents."""
    k: float = 32
    """Average number of active latents per pair (L0)."""
    max_unique_pairs: int = 36_000
    """Distinct pairs to train on."""
    training_tokens: int = 245_760
    """Pairs to train on, counting repeats."""
    eval_pairs: int = 10_000
    """Held-out pairs for evaluation."""
    dtype: str = AUTO
    """dtype of the models; auto uses bfloat16 if the device supports it natively, otherwise
    float32."""
    device: str = "cpu"
    """Device of the models and the crosscoder."""
    seed: int = 42
    """Seed of initialization and shuffling."""
    output: str = "runs/demo"
    """Folder for the results."""
    overwrite: bool = switch()
    """Overwrite the output folder."""
