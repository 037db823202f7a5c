"""Writes a model organism as a folder: two models, training text, and prompts that show the
difference."""

import json
import shutil
from pathlib import Path

from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.output_folder import locked_output
from sae_lens_dfc.core.schema import check_seed
from sae_lens_dfc.core.terminal import print_result
from sae_lens_dfc.organisms.lora import write_lora
from sae_lens_dfc.organisms.named import organism_of
from sae_lens_dfc.organisms.options import OrganismOptions
from sae_lens_dfc.organisms.organism import PLANTED_FILENAME
from sae_lens_dfc.organisms.texts import N_PASSAGES, training_texts

TEXT = "text.jsonl"
PROMPTS_FILENAME = "prompts.json"
ADAPTER = "adapter"


def write_organism(options: OrganismOptions) -> None:
    """Build the organism, write its folder atomically, and print its behavior measures.

    Raises:
        ValueError: The output folder cannot be overwritten, or the seed exceeds 64 bits.
    """
    check_seed(options.seed)
    with locked_output(options.output, options.overwrite, "planted organism", [PLANTED_FILENAME]):
        _write_organism(options)


def _write_organism(options: OrganismOptions) -> None:
    organism = organism_of(options.name, options.seed)
    shown, others = training_texts(organism, N_PASSAGES, options.seed)
    output = Path(options.output)
    with atomic_folder(options.output) as folder:
        for which, model in (("a", organism.model_a), ("b", organism.model_b)):
            shutil.copytree(model.model_name, folder / which)
        if organism.added:
            write_lora(folder / ADAPTER, output.resolve() / "a", organism.added)
        with (folder / TEXT).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in shown + others)
        prompts = {
            split: {kind: [item._asdict() for item in own] for kind, own in items._asdict().items()}
            for split, items in organism.items.items()
        }
        (folder / PROMPTS_FILENAME).write_text(json.dumps(prompts, indent=1) + "\n")
        kept = {
            "organism": options.name,
            "seed": options.seed,
            **{k: organism.manifest[k] for k in ("settings", "measures", "sha256")},
        }
        (folder / PLANTED_FILENAME).write_text(json.dumps(kept, indent=1) + "\n")
    for name, value in sorted(organism.manifest["measures"].items()):
        print_result(f"{name}: {value:.3f}")
    print_result(f"Model A: {output / 'a'}\nModel B: {output / 'b'}")
    if organism.added:
        print_result(f"Model B as a LoRA on A: {output / ADAPTER}")
    print_result(f"Text: {output / TEXT}")
