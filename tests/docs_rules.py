"""What is put in place of what when the pages' code runs: the tiny models, less text, fewer steps.
Each must take place.

To give a page a rule, add it to `RULES`; a page whose blocks run as they are needs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

EVERYWHERE: dict[str, str] = {
    "Qwen/Qwen3-0.6B": "{llama}",
    "google/gemma-3-270m": "{gpt2}",
    "roneneldan/TinyStories": "text.jsonl",
    "cuda": "cpu",
}
"""In the blocks of all pages."""

SMALL: dict[str, str] = {
    "demo": "--max-unique-pairs 1500 --training-tokens 5120 --d-sae 64 --k 6 --eval-pairs 400",
    "check": "--training-tokens 1280 --train-batch-size-tokens 64 --context-size 48 --eval-every-n-documents 4"
    " --n-batches-in-buffer 8 --n-batches-for-norm-estimate 4",
    "train": "--training-tokens 1280 --train-batch-size-tokens 64 --context-size 48 --eval-every-n-documents 4"
    " --n-batches-in-buffer 8 --n-batches-for-norm-estimate 4",
    "cache": "--max-unique-pairs 600 --context-size 48 --eval-every-n-documents 4",
    "evaluate": "--eval-pairs 400",
    "latents": "--eval-pairs 400",
    "screen": "--eval-pairs 400 --keep 2 --texts 3 --controls 2 --fit-pairs 600",
    "export": "--eval-pairs 400 --fit-pairs 600",
    "steer": "--eval-pairs 400",
    "generate": "--max-new-tokens 4",
}
"""Flags that make a command small; they come last, so they win. `evaluate RUN --output` takes those
of `SMALL_FULL` too."""

SMALL_FULL = "--null-pairs 600 --downstream-pairs 40 --behavior-latents 1"


@dataclass(frozen=True)
class Rules:
    """How the blocks of one page are run."""

    replace: Mapping[str, str] = field(default_factory=dict)
    """Text of its blocks, and what stands there when they run."""
    not_run: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of commands, or of blocks of Python, that are read and not run, each with the
    reason: their flags are parsed, their imports made."""
    declared: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of blocks of output, each with where the output comes from."""
    given: str = ""
    """Python that runs before the page: names that its reader has from elsewhere."""
    warnings: tuple[str, ...] = ()
    """Warnings of other packages that are let pass."""


HOURS = "minutes or hours: its own tests run it small"
BIG = "two 8B models on GPUs"
FETCHED = "takes models that the command before it downloads"
HUB = "opens models of the hub: tests/training/test_organisms.py runs recipes on stand-ins"
REAL = (
    "fine-tunes a real model for minutes: tests/organisms/test_model_organisms.py builds organisms"
)

IN_PYTHON = {
    "training_tokens=2_000_000": "training_tokens=1_280, max_unique_pairs=800, train_batch_size_tokens=64",
    "blocks.14.": "blocks.1.",
    "blocks.9.": "blocks.0.",
}

RULES: dict[str, Rules] = {
    "README.md": Rules(replace=IN_PYTHON),
    "benchmarks/README.md": Rules(
        not_run={"python -m benchmarks": HOURS, "sae-lens-dfc demo --model-a FOLDER": FETCHED},
    ),
    "docs/data.md": Rules(not_run={"sae-lens-dfc": BIG, "torchrun": BIG}),
    "docs/export.md": Rules(
        given="""
from pathlib import Path

from sae_lens_dfc import ModelConfig
from sae_lens_dfc.models.loading import load_model
affine_maps = rows = None
hooked = load_model(ModelConfig("{llama}"))
model, tokens = hooked.model, hooked.model.to_tokens([Path("my-text.txt").read_text()[:400]])[:, :64].repeat(8, 1)
""",
        not_run={
            "from sae_lens_dfc.hub": "goes to the hub: tests/test_hub.py runs it against a stand-in"
        },
        warnings=("ignore:Using a non-tuple sequence:UserWarning",),
    ),
    "docs/how-to/demo.md": Rules(replace=IN_PYTHON),
    "docs/how-to/check.md": Rules(
        declared={"                A  ": "sae-lens-dfc check on the demo's two models"},
    ),
    "docs/how-to/chat.md": Rules(
        replace={
            # The tiny model has no template.
            "{model_name: Qwen/Qwen3-0.6B}": "{model_name: {llama}, chat_template: template.jinja}",
        },
    ),
    "docs/architecture.md": Rules(
        declared={"cli            ": "the order of the folders, held by import-linter"}
    ),
    "docs/measures.md": Rules(declared={"ablated:  x_source": "a formula"}),
    "docs/how-to/fine-tune.md": Rules(
        replace={
            "my/base": "{llama}",
            "my/fine-tune": "{fine_tune}",
            "lr_warm_up_steps: 40": "lr_warm_up_steps: 4",
            "lr_decay_steps: 80": "lr_decay_steps: 8",
        },
        not_run={"sae-lens-dfc model-organism": REAL},
    ),
    "docs/how-to/adapters.md": Rules(
        replace={"my/adapter": "{adapter}", "my/base": "{llama}"},
        not_run={"sae-lens-dfc train --model-b maius/": HUB},
    ),
    "docs/how-to/organisms.md": Rules(not_run={"sae-lens-dfc train --recipe organism-": HUB}),
    "docs/how-to/gpus.md": Rules(
        replace={
            "--max-unique-pairs 1000000": "",
            "--sae.d-sae 16384": "--sae.d-sae 64",
        },
        not_run={
            "torchrun": "two 8B models on 8 GPUs; tests/training/test_torchrun.py runs it small"
        },
    ),
}
