"""An organism as a folder that any command takes: two models, the text to train on, and the prompts that show the difference."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from sae_lens_dfc.benchmark.planted.harvest import training_texts
from sae_lens_dfc.benchmark.planted.organism import MANIFEST, NULL
from sae_lens_dfc.benchmark.planted.run import FULL, Run, organism_of
from sae_lens_dfc.benchmark.planted.training import Training
from sae_lens_dfc.output import all_or_nothing, claimed, say

TEXT = "text.jsonl"
PROMPTS = "prompts.json"


@dataclass(kw_only=True)
class OrganismOptions:
    """Build two models whose one difference is known, since it was put there: for `train`, and to see what finds it."""

    name: str = field(positional=True, choices=[name for name in FULL if name != NULL])
    """Behaviour and strength: SmolLM2-135M-Instruct, and it fine-tuned. topic: two small models from scratch, of other widths and
    tokenizers, of which one read of a topic that the other did not."""
    output: str
    """Folder that takes both models (a, b), text.jsonl to train a crosscoder on, prompts.json and planted.json."""
    seed: int = 0
    """Of what is trained; the same seed gives the same weights."""
    overwrite: bool = False
    """Replace what the output folder holds."""


def write_organism(options: OrganismOptions) -> None:
    """Build the organism, write its folder whole or not at all, and say what it shows.

    Raises:
        ValueError: The output folder holds something that should stay.
    """
    with claimed(options.output, options.overwrite, "planted organism", [MANIFEST]):
        _write_organism(options)


def _write_organism(options: OrganismOptions) -> None:
    organism = organism_of(Run(options.name, options.seed))
    shown, others = training_texts(organism, Training.n_texts, options.seed)
    with all_or_nothing(options.output) as folder:
        for which, model in (("a", organism.model_a), ("b", organism.model_b)):
            shutil.copytree(model.model_name, folder / which)
        with (folder / TEXT).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in shown + others)
        prompts = {
            split: {kind: [item._asdict() for item in own] for kind, own in items._asdict().items()}
            for split, items in organism.items.items()
        }
        (folder / PROMPTS).write_text(json.dumps(prompts, indent=1) + "\n")
        kept = {
            "organism": options.name,
            "seed": options.seed,
            **{k: organism.manifest[k] for k in ("settings", "measures", "sha256")},
        }
        (folder / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n")
    output = Path(options.output)
    for name, value in sorted(organism.manifest["measures"].items()):
        say(f"{name}: {value:.3f}")
    say(f"Model A: {output / 'a'}\nModel B: {output / 'b'}\nText: {output / TEXT}")
