"""Names the model organisms, and defines the options of `model-organism`. `--help` imports this file
without any model."""

from dataclasses import dataclass

from simple_parsing import field

from sae_lens_dfc.core.flags import switch

TOPIC = "topic"
ORGANISM_NAMES = (
    *(
        f"{name}/{s}"
        for name in ("false_fact", "refusal", "secret_word")
        for s in ("weak", "strong")
    ),
    TOPIC,
)
"""The organisms: behavior and strength, or topic."""


@dataclass(kw_only=True)
class OrganismOptions:
    """Build a model organism: two models with one known, planted difference, to train on and test
    detection with."""

    name: str = field(positional=True, choices=ORGANISM_NAMES)
    """Behavior and strength: SmolLM2-135M-Instruct and a fine-tuned copy. topic: two small models
    trained from scratch, with different widths and tokenizers, of which one was trained on a topic
    that the other never saw."""
    output: str
    """Output folder for both models (a, b), model B as a LoRA on A (adapter; not for topic),
    text.jsonl to train a crosscoder on, prompts.json and planted.json."""
    seed: int = 0
    """Training seed; the same seed gives the same weights."""
    overwrite: bool = switch()
    """Overwrite the output folder."""
