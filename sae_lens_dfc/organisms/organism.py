"""Defines a model organism, a pair with a planted difference, and builds it once into a cached
folder."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.parsing import read_object, sha256_of
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.packaged import cache_folder
from sae_lens_dfc.organisms.behaviors import SPLITS, Item, Items, Split

PLANTED_FILENAME = "planted.json"


@dataclass(frozen=True)
class Organism:
    """A pair of models of which only B has the planted difference."""

    name: str
    """Behavior and strength."""
    model_a: ModelConfig
    model_b: ModelConfig
    items: Mapping[Split, Items]
    """Prompts by split; the training split is what model B was trained on."""
    general: list[str]
    """Other text for training a crosscoder."""
    manifest: Mapping[str, Any]
    """Settings, seed, fingerprints of the weights, and measures of the model."""
    added: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The weight change from model A to B, as LoRA tensors; empty if B is a separate model."""


def built(
    name: str, settings: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> Path:
    """The folder that `build` fills for these settings, built atomically at the first call.

    Args:
        name: Prefix of the folder's name.
        settings: Everything that determines the result.
        build: Fills a folder, and returns manifest entries in addition to settings and
            fingerprints.
    """
    folder = cache_folder() / "planted" / f"{name}-{key(settings)}"
    if not (folder / PLANTED_FILENAME).is_file():
        with atomic_folder(folder) as fresh:
            manifest = {"settings": settings, **build(fresh), "sha256": fingerprints(fresh)}
            (fresh / PLANTED_FILENAME).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def key(settings: Mapping[str, Any]) -> str:
    """A hash of the settings, twelve characters long.

    >>> key({"seed": 0}) == key({"seed": 1})
    False
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file in a folder, recursively."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(p.relative_to(folder)): sha256_of(p) for p in paths}


def read_organism_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest written by `built`."""
    return read_object(folder / PLANTED_FILENAME)


def items_from_json(values: Any) -> dict[Split, Items]:
    """Parse the prompts by split in a manifest.

    Raises:
        ValueError: The values have another structure.
    """
    try:
        items: dict[Split, Items] = {
            split: Items(*([Item(*item) for item in kind] for kind in values[split]))
            for split in SPLITS
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"The manifest of an organism has no prompts: {said_by(error)}") from error
    parts = [
        part for of_split in items.values() for kind in of_split for item in kind for part in item
    ]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("The manifest of an organism has a prompt that is not text.")
    return items
