"""Loads a causal language model with transformers, and refuses it unless every weight comes from
its checkpoint."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.util import str_to_dtype
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from sae_lens_dfc.core.terminal import MOST_OF_OURS, counted, said_by, sentence
from sae_lens_dfc.core.untrusted.gguf import check_gguf
from sae_lens_dfc.models.opening.model_files import check_weights

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
PARAMETERS_OF_A_BYTE = 8
"""Number of parameters in a byte, in the densest quantization."""
SMALL_CHECKPOINT = 50_000_000
"""Number of parameters and buffers that may be missing from the files: those of a tiny test model,
or masks and positions that are computed."""
MAX_LAYERS = 2000
NOT_WEIGHTS = re.compile(r"(\.(attn|attention|self_attn)\.(masked_)?bias|\.inv_freq)$")
"""Causal masks and rotary frequencies, which older versions of transformers saved and newer ones
compute."""
PLAIN = "AutoModelForCausalLM.from_pretrained(…).save_pretrained(FOLDER)"
WEIGHTS_SHOWN = 3
"""Maximum number of weight names in a message."""


class Unusable(ValueError):
    """A model exists but cannot be used as it is; the message says why and what to do."""


class Pretrained(NamedTuple):
    """A loaded model, and notes on what was changed to load it."""

    model: PreTrainedModel
    notes: tuple[str, ...]
    """One sentence for each thing that was fixed."""


def load_pretrained(name: str, revision: str | None, dtype: str) -> Pretrained:
    """Load a causal language model by hub name, folder or GGUF file; code that comes with it is not
    run.

    Every parameter comes from the checkpoint. A prefix that torch.compile, DistributedDataParallel
    or a training script added to all names is stripped. A checkpoint without a head is refused,
    although training does not use the head: without it, the model's loss, and so the trained
    crosscoder, could not be evaluated.

    Args:
        name: Hub name, folder, or .gguf file.
        revision: Branch, tag or commit of a hub model.
        dtype: Number format of its parameters.

    Raises:
        Unusable: A weight is missing, has another shape or does not belong to the model; the
            message names some weights and says what to do.
        Exception: Whatever transformers raises if the model does not exist.
    """
    config = read_config(name, revision)
    opened, loading = _from_pretrained(name, revision, dtype, config)
    if loading.is_complete:
        return Pretrained(opened, ())
    if prefix := loading.strippable_prefix():
        del opened
        mapping = {f"^{re.escape(prefix)}": ""}
        opened, again = _from_pretrained(name, revision, dtype, config, key_mapping=mapping)
        if again.is_complete:
            note = f"The prefix {prefix!r} was stripped from the names of its weights."
            return Pretrained(opened, (note,))
    raise Unusable(loading.complaint(type(opened).__name__))


class Loading(NamedTuple):
    """How a checkpoint's weights fit the model that its config.json describes."""

    missing: Sequence[str]
    """Parameters that the checkpoint does not have."""
    unexpected: Sequence[str]
    """Weights of the checkpoint that the model does not have."""
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    """Name, shape in the checkpoint and shape in the model, for each weight whose shapes differ."""

    @classmethod
    def of(
        cls, info: dict[str, Any], model: PreTrainedModel, config: PretrainedConfig
    ) -> "Loading":
        """Read the loading info that transformers returns, ignoring buffers and the weights of
        image and audio parts."""
        buffers = {name for name, _ in model.named_buffers()}
        unexpected = [
            key
            for key in info["unexpected_keys"]
            if key not in buffers and not NOT_WEIGHTS.search(key)
        ]
        if unexpected:
            unexpected = sorted(set(unexpected) - whole_model_weights(config))
        mismatched = [
            (key, tuple(was), tuple(wanted)) for key, was, wanted in info["mismatched_keys"]
        ]
        return cls(sorted(info["missing_keys"]), sorted(unexpected), sorted(mismatched))

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def strippable_prefix(self) -> str | None:
        """The prefix that all weight names share and because of which no weight matched its
        parameter; none if there is no such prefix.

        >>> names = ["model.embed_tokens.weight", "model.norm.weight"]
        >>> Loading(names, [f"_orig_mod.module.{n}" for n in names], []).strippable_prefix()
        '_orig_mod.module.'
        """
        missing = set(self.missing)
        for key in self.unexpected[:1]:
            known = max((m for m in missing if key.endswith(f".{m}")), key=len, default="")
            prefix = key.removesuffix(known)
            if known and all(
                other.startswith(prefix) and other.removeprefix(prefix) in missing
                for other in self.unexpected
            ):
                return prefix
        return None

    def complaint(self, architecture: str) -> str:
        """Two sentences: what is wrong with the checkpoint, and what to do about it."""
        parts: list[str] = []
        if self.missing:
            parts.append(f"lacks {some_names(self.missing)}, which would be random")
        if self.mismatched:
            shapes = [f"{key} {list(was)} for {list(now)}" for key, was, now in self.mismatched]
            parts.append(f"has {some_names(shapes)} of another shape than config.json says")
        if self.unexpected:
            parts.append(f"has {some_names(self.unexpected)} that {architecture} does not have")
        return f"its checkpoint {', '.join(parts)}. {self._remedy()}"

    def _remedy(self) -> str:
        if self.mismatched:
            return "Correct config.json, or resize the model before saving it."
        ends = ("head", "embed_out", "output")
        is_head = all(name.rpartition(".")[0].endswith(ends) for name in self.missing)
        if self.missing and not self.unexpected and is_head:
            return f"It was saved without its head: save it whole, with {PLAIN}."
        if self.missing and not self.unexpected:
            return "Is a file of weights missing? Copy all of them into the folder."
        return f"Save the causal language model itself, with {PLAIN}."


def whole_model_weights(config: PretrainedConfig) -> set[str]:
    """Names of all weights of a multimodal model, of which only the text part is loaded; empty for
    other models."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return set()
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return {name for name, _ in whole.named_parameters()}


def some_names(names: Sequence[str]) -> str:
    """The number of weights, and the first few names.

    >>> some_names(["a", "b"]), some_names(list("abcde"))
    ('2 weights (a, b)', '5 weights (a, b, c, …)')
    """
    shown = ", ".join(names[:WEIGHTS_SHOWN]) + (", …" if len(names) > WEIGHTS_SHOWN else "")
    return f"{counted(len(names), 'weight')} ({shown})"


def _from_pretrained(
    name: str, revision: str | None, dtype: str, config: PretrainedConfig, **how: Any
) -> tuple[PreTrainedModel, Loading]:
    path = Path(name)
    where: dict[str, Any] = {"pretrained_model_name_or_path": name, "revision": revision}
    if path.suffix == ".gguf" and path.is_file():
        check_room(config, [path])
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif path.is_dir():
        _check_weights(path)
        check_room(config, [file for end in WEIGHT_PATTERNS for file in path.glob(end)])
    verbosity = transformers_logging.get_verbosity()
    # It prints a table of what `Loading.complaint` says in a sentence.
    transformers_logging.set_verbosity_error()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            **where,
            **how,
            dtype=str_to_dtype(dtype),
            # TransformerBridge computes attention this way; another kernel differs by 1e-3.
            attn_implementation="eager",
            # Explicit, because transformers would otherwise ask on the terminal, where piped input
            # could answer yes.
            trust_remote_code=False,
            # So that all mismatched shapes are reported at once; the model is then refused.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = opened
    if info["error_msgs"]:
        raise Unusable(f"transformers could not read it: {sentence(info['error_msgs'][0])}")
    return model, Loading.of(info, model, config)


def _check_weights(folder: Path) -> None:
    try:
        check_weights(folder)
    except ValueError as error:
        raise Unusable(said_by(error, MOST_OF_OURS)) from error


def read_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """Read a model's configuration from its config.json or its GGUF file.

    Args:
        name: Hub name, folder, or .gguf file.
        revision: Branch, tag or commit of a hub model.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        check_gguf(path)
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def check_room(config: PretrainedConfig, weights: Iterable[Path]) -> None:
    """Refuse a model that claims many more parameters than its files have bytes for; transformers
    would create the rest in memory.

    Raises:
        Unusable: The model claims too many parameters or layers.
    """
    n_bytes = sum(path.stat().st_size for path in weights)
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(n_layers, int) or n_layers > MAX_LAYERS:
        raise Unusable(f"it claims {n_layers!r:.80} layers.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    n_numbers = sum(x.numel() for x in chain(model.parameters(), model.buffers()))
    if n_numbers > PARAMETERS_OF_A_BYTE * n_bytes + SMALL_CHECKPOINT:
        raise Unusable(
            f"it claims {n_numbers:,} parameters, and its files have {n_bytes:,} bytes. Is a file of weights missing?"
        )
