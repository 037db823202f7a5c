"""Defines the settings of one model."""

from dataclasses import dataclass, field
from typing import Literal

from sae_lens_dfc.core.flags import switch

AUTO = "auto"
"""Selects bfloat16 if the device is fast in it, else float32."""
ModelName = Literal["a", "b"]
"""One of the two models of a pair."""
OTHER: dict[ModelName, ModelName] = {"a": "b", "b": "a"}
"""The other model of the pair."""


@dataclass
class ModelConfig:
    """How one of the two models is loaded and the hook at which its activations are read."""

    model_name: str = ""
    """Hub name, folder, .gguf file, or a PEFT adapter's hub name or folder."""
    hook_name: str = ""
    """TransformerLens hook whose activations are read, e.g. blocks.9.hook_resid_post; if empty, the
    middle block's output."""
    model_class_name: Literal["TransformerBridge", "HookedTransformer"] = "TransformerBridge"
    """TransformerLens class that runs the model; 4.0 removed HookedTransformer."""
    dtype: str = "float32"
    """Dtype in which the model runs; auto selects bfloat16 if the device is fast in it, else
    float32."""
    dtype_was_auto: bool = field(default=False, metadata={"cmd": False})
    """Whether dtype was resolved from auto."""
    device: str = "cpu"
    """Device on which the model runs."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    prepend_bos: bool = True
    """Start each context with the tokenizer's beginning-of-sequence token, if it has one."""
    drop_unused_layers: bool = switch()
    """Free the memory of the layers above the hook; the model can then only be read at the hook."""
    base: str | None = None
    """Base model to merge the adapter (LoRA, PEFT) into, if model_name is one; if unset, the base
    that adapter_config.json names."""
    base_revision: str | None = None
    """Branch, tag or commit of the base model on a hub."""
    adapter_subfolder: str | None = None
    """Folder of the hub repository that holds the adapter, if it is not at the root."""
    chat_template: str | None = None
    """Jinja chat template, or a file that holds one, for a tokenizer without one; if unset, the
    tokenizer's own."""


NO_ADAPTER: dict[str, None] = {"base": None, "base_revision": None, "adapter_subfolder": None}
"""The adapter-only settings of `ModelConfig`, with the values of a model that is not an adapter."""
