"""Writes a low-rank change of a model's weights as an adapter folder that PEFT opens, without using
PEFT itself."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sae_lens_dfc.models.opening.adapters import ADAPTER_WEIGHTS, CONFIG

PEFT_PREFIX = "base_model.model."
READS, WRITES = ".lora_A.weight", ".lora_B.weight"


def lora_tensors(module: str, reads: Tensor, writes: Tensor) -> dict[str, Tensor]:
    """Name the factors of `writes @ reads`, a change of the weight of one linear layer, as PEFT
    names them.

    Args:
        module: Name of the layer, as in `named_modules`.
        reads: One row for each rank.
        writes: One column for each rank.

    >>> import torch
    >>> list(lora_tensors("lm_head", torch.ones(1, 2), torch.ones(3, 1)))
    ['base_model.model.lm_head.lora_A.weight', 'base_model.model.lm_head.lora_B.weight']
    """
    tensors = {READS: reads, WRITES: writes}
    return {f"{PEFT_PREFIX}{module}{end}": x.detach().cpu() for end, x in tensors.items()}


def share_of(tensors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Scale a change by `share`."""
    return {name: share * x if name.endswith(WRITES) else x for name, x in tensors.items()}


def write_lora(folder: Path, base: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder that PEFT and `ModelConfig` open.

    Args:
        folder: Folder to create; it must not exist.
        base: Folder of the base model. Use an absolute path, because PEFT resolves a relative path
            against the current working directory.
        tensors: Results of `lora_tensors` for all layers, all of the same rank.
    """
    reads = {name: x for name, x in tensors.items() if name.endswith(READS)}
    (rank,) = {len(x) for x in reads.values()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        # The change is added as it is: PEFT multiplies it by lora_alpha / r.
        "lora_alpha": rank,
        "target_modules": [name.removeprefix(PEFT_PREFIX).removesuffix(READS) for name in reads],
    }
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS[0], {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
