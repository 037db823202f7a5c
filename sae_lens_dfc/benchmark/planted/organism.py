"""A pair whose difference was put there: where its two models lie, and the prompts that show it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_dfc.benchmark.planted.behaviours import SPLITS, Item, Items, Split
from sae_lens_dfc.demo import cache_folder
from sae_lens_dfc.files import read_object
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.output import all_or_nothing

MANIFEST = "planted.json"
NULL = "null"
"""Name of the organism in which nothing is planted: model A twice."""


@dataclass(frozen=True)
class Organism:
    """Model B has what was planted, model A has not."""

    name: str
    """Behaviour and strength."""
    model_a: ModelConfig
    model_b: ModelConfig
    items: Mapping[Split, Items]
    """Prompts by split; those of training are the ones that it learnt from."""
    general: list[str]
    """Other text, to train a crosscoder on."""
    manifest: Mapping[str, Any]
    """Settings, seed, fingerprints of the weights, and what was measured of the model."""


def built(
    name: str, settings: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> Path:
    """The folder of what `build` makes with these settings, made at the first call, whole or not at all.

    Args:
        name: Begins the folder's name.
        settings: All that decides the result.
        build: Fills a folder, and gives what the manifest is to say beside settings and fingerprints.
    """
    folder = cache_folder() / "planted" / f"{name}-{key(settings)}"
    if not (folder / MANIFEST).is_file():
        with all_or_nothing(folder) as fresh:
            manifest = {"settings": settings, **build(fresh), "sha256": fingerprints(fresh)}
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def key(settings: Mapping[str, Any]) -> str:
    """Twelve characters that tell settings apart.

    >>> key({"seed": 0}) == key({"seed": 1})
    False
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights in a folder and below it."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `built` wrote."""
    return read_object(folder / MANIFEST)


def items_from_json(values: Any) -> dict[Split, Items]:
    """Prompts by split, as a manifest has them.

    Raises:
        ValueError: It has something else.
    """
    try:
        items: dict[Split, Items] = {
            split: Items(*([Item(*item) for item in kind] for kind in values[split]))
            for split in SPLITS
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"The manifest of an organism has no prompts: {error!r}.") from error
    parts = [
        part for of_split in items.values() for kind in of_split for item in kind for part in item
    ]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("The manifest of an organism has a prompt that is no text.")
    return items
