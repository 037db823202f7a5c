"""Loads a language model with its tokenizer and adapter, and wraps it for TransformerLens."""

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from sae_lens.util import str_to_dtype
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_dfc.core.machine import return_freed_memory
from sae_lens_dfc.core.parsing import read_text
from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by
from sae_lens_dfc.core.untrusted.gguf import check_gguf
from sae_lens_dfc.models.config import AUTO, NO_ADAPTER, ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel, LanguageModel, check_device
from sae_lens_dfc.models.number_formats import chosen_dtype, warn_where_slow
from sae_lens_dfc.models.opening.adapters import (
    Adapter,
    Merged,
    base_config,
    find_adapter,
    load_merged,
    naming_base,
)
from sae_lens_dfc.models.opening.fitting import check_causal
from sae_lens_dfc.models.opening.guard import reading_only
from sae_lens_dfc.models.opening.model_files import check_model_file, check_pointer
from sae_lens_dfc.models.opening.pretrained import Unusable, load_pretrained, read_config
from sae_lens_dfc.models.opening.supported import (
    UnsupportedModelError,
    check_architecture,
    check_blocks,
    check_logits,
    computed,
)

logger = logging.getLogger(__name__)


MAX_TEMPLATE = 1_000_000
"""Maximum size of a chat template in bytes; long ones have about 20,000."""

TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "tekken.json")
"""File patterns of which a tokenizer's folder matches at least one."""


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name, folder or GGUF file; code that comes with it is not run.

    Raises:
        ValueError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = Path(name_or_path)
    try:
        for file in (x for kind in TOKENIZER_FILES for x in path.glob(kind) if x.is_file()):
            check_pointer(file)
        if path.suffix == ".gguf" and path.is_file():
            check_model_file(path)
    except ValueError as error:
        raise ValueError(
            f"Could not load a tokenizer from {name_or_path!r}: {said_by(error)}"
        ) from None
    try:
        if path.suffix == ".gguf" and path.is_file():
            check_gguf(path)
            # Explicit, because transformers would otherwise ask on the terminal whether to run a
            # tokenizer's own code.
            return AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )
        return AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        )
    except Exception as error:
        if path.is_dir() and not any(any(path.glob(kind)) for kind in TOKENIZER_FILES):
            raise ValueError(
                f"Could not load a tokenizer from {name_or_path!r}: the folder holds none. Copy tokenizer.json and tokenizer_config.json "
                "of the model into it, or save the tokenizer there with save_pretrained."
            ) from error
        raise ValueError(
            f"Could not load a tokenizer from {name_or_path!r}: {type(error).__name__}: "
            f"{said_by(error)} Give a hub name, a folder with tokenizer.json, or a .gguf file."
        ) from error


def load_model(cfg: ModelConfig) -> HookedModel:
    """Load a model by hub name, folder or GGUF file, or a PEFT adapter merged into its base.

    Only data is read: code that comes with a model is not run, and no process is started.

    Raises:
        ValueError: The model cannot be loaded, lacks weights or is unsupported; the message says
            what to do.
    """
    if not cfg.model_name:
        raise ValueError(
            "A model has no name. Set model_a.model_name and model_b.model_name; model A's may be left out where model B "
            "is an adapter, a folder or hub repository with an adapter_config.json."
        )
    check_device(cfg.device)
    cfg = in_fast_format(cfg)
    chat_template = None if cfg.chat_template is None else read_chat_template(cfg.chat_template)
    with reading_only():
        adapter = adapter_of(cfg)
        tokenizer = _load_tokenizer(cfg, adapter)
        # Checked before TransformerLens gets the tokenizer, because it adds such a token if there
        # is none.
        has_bos = tokenizer.bos_token_id is not None
        model, notes, merged = _wrapped(cfg, adapter, tokenizer)
    if chat_template is not None:
        # Only now, because TransformerLens may have reloaded the tokenizer from its files.
        model.tokenizer.chat_template = chat_template  # type: ignore[union-attr]
    for note in notes:
        logger.info("Model %s: %s", cfg.model_name, note)
    hooked = HookedModel(
        model=model,
        hook_name=cfg.hook_name,
        name=Path(cfg.model_name).name if Path(cfg.model_name).exists() else cfg.model_name,
        prepend_bos=cfg.prepend_bos and has_bos,
        revision=cfg.revision,
        notes=notes,
        merged=merged,
    )
    if cfg.drop_unused_layers:
        hooked.drop_unused_layers()
        with _loading(cfg):
            hooked.model.to(cfg.device)
    return_freed_memory()  # memory used while loading: files, and weights in another dtype
    return hooked


def in_fast_format(cfg: ModelConfig, begun: str | None = None) -> ModelConfig:
    """Resolve the dtype `auto` in a configuration.

    Args:
        cfg: The configuration.
        begun: Dtype of the run that is resumed; if None, one that the device is fast in.

    Raises:
        ValueError: The device is not available.
    """
    if cfg.dtype != AUTO:
        return cfg
    check_device(cfg.device)
    return replace(cfg, dtype=begun or chosen_dtype(cfg.device), dtype_was_auto=True)


def load_model_a(model_a: ModelConfig, model_b: ModelConfig) -> HookedModel:
    """Load model A, which may be the base that the adapter of model B names.

    Raises:
        ValueError: It cannot be loaded; if it is that base, the message names the adapter, because
            the caller may not have named the base.
    """
    try:
        return load_model(model_a)
    except ValueError as error:
        adapter = adapter_of(model_b)
        if adapter is None or adapter.base != model_a.model_name:
            raise
        raise ValueError(
            f"Could not load {adapter.base!r}, the base of adapter {adapter.name!r}: {said_by(error, MOST_OF_OURS)} Say where the "
            "base is now as the model's `base` (--model-b.base, of demo --base-b)."
        ) from error


def adapter_of(cfg: ModelConfig) -> Adapter | None:
    """The adapter that the configuration names; None if it names a whole model."""
    name, revision = cfg.model_name, cfg.revision
    return find_adapter(name, revision, cfg.adapter_subfolder, cfg.base, cfg.base_revision)


def or_base_of(model_a: ModelConfig, model_b: ModelConfig) -> ModelConfig:
    """Model A's settings; if it has no name and model B is an adapter, those of the adapter's base.

    If nothing is set for model A, it is read like model B: at the same hook and in the same dtype.
    """
    if model_a.model_name or not model_b.model_name:
        return model_a
    adapter = adapter_of(model_b)
    if adapter is None:
        return model_a
    settings = model_b if model_a == ModelConfig() else model_a
    return replace(
        settings,
        model_name=adapter.base,
        revision=adapter.base_revision,
        hook_name=settings.hook_name or model_b.hook_name,
        **NO_ADAPTER,
    )


def _load_tokenizer(cfg: ModelConfig, adapter: Adapter | None) -> PreTrainedTokenizerBase:
    if adapter is None:
        return load_tokenizer(cfg.model_name, cfg.revision)
    if adapter.has_tokenizer:
        return load_tokenizer(str(adapter.folder))
    with _loading(cfg), naming_base(adapter):
        return load_tokenizer(adapter.base, adapter.base_revision)


def _wrapped(
    cfg: ModelConfig, adapter: Adapter | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[LanguageModel, tuple[str, ...], Merged | None]:
    """The model in its TransformerLens class, the notes on what was fixed, and what it was merged
    from."""
    wrap = _to_bridge if cfg.model_class_name == "TransformerBridge" else _to_hooked_transformer
    # On the CPU first, so that dropped layers never use memory on the device.
    device = "cpu" if cfg.drop_unused_layers else cfg.device
    merged = None
    with _loading(cfg):
        config = (
            read_config(cfg.model_name, cfg.revision) if adapter is None else base_config(adapter)
        )
    check_causal(config, cfg.model_name)
    with _loading(cfg):
        warn_where_slow(cfg.dtype, cfg.device)
        if adapter is None:
            opened = load_pretrained(cfg.model_name, cfg.revision, cfg.dtype)
        else:
            opened, merged = load_merged(adapter, cfg.dtype)
            cfg = replace(cfg, model_name=adapter.base)
        model = opened.model.to(device)  # type: ignore[arg-type]
        # TransformerLens trusts the architecture in config.json, and for some runs code from the
        # folder.
        model.config.architectures = [type(model).__name__]
        expected = computed(model)
        wrapped = wrap(model, tokenizer, replace(cfg, device=device))
        check_logits(cfg.model_name, wrapped, expected)
        return wrapped, opened.notes, merged


@contextmanager
def _loading(cfg: ModelConfig) -> Iterator[None]:
    """Re-raise any error while a model is loaded as one that names the model."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Unusable as error:
        raise ValueError(
            f"Could not load model {cfg.model_name!r}: {said_by(error, MOST_OF_OURS)}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"Could not load model {cfg.model_name!r} as {cfg.model_class_name} on {cfg.device!r}: "
            f"{type(error).__name__}: {said_by(error)} "
            "Give a hub name, a folder with config.json and weights, or a .gguf file."
        ) from error


def read_chat_template(template_or_file: str) -> str:
    """Return a Jinja template unchanged, or read it from a file.

    Raises:
        ValueError: The argument is neither.

    >>> read_chat_template("{{ messages }}")
    '{{ messages }}'
    """
    if "{{" in template_or_file or "{%" in template_or_file:
        return template_or_file
    path = Path(template_or_file)
    if not path.is_file():
        raise ValueError(
            f"chat_template={template_or_file!r} is neither a Jinja template (it has no {{{{ or {{%) nor a file. "
            "Give one of the two."
        )
    return read_text(path, MAX_TEMPLATE)


def _to_bridge(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig
) -> TransformerBridge:
    check_architecture(cfg.model_name, hf_model)
    bridge = TransformerBridge.boot_transformers(
        cfg.model_name,
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=cfg.device,
        dtype=str_to_dtype(cfg.dtype),
    )
    check_blocks(cfg.model_name, hf_model, bridge)
    return bridge


def _to_hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig
) -> LanguageModel:
    try:
        return _hooked_transformer(hf_model, tokenizer, cfg)
    except Exception as error:
        raise Unusable(
            f"HookedTransformer cannot open {cfg.model_name!r}: {type(error).__name__}: {said_by(error)} "
            "Use model_class_name='TransformerBridge'."
        ) from error


def _hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig
) -> LanguageModel:
    try:
        HookedTransformer = import_module("transformer_lens.HookedTransformer").HookedTransformer
        tl_loading = import_module("transformer_lens.loading_from_pretrained")
    except ImportError as error:
        raise ValueError("this TransformerLens has none: 4.0 removed it.") from error

    if not Path(cfg.model_name).exists():
        with redirect_stdout(sys.stderr):  # its messages must not mix with a command's output
            return HookedTransformer.from_pretrained_no_processing(
                cfg.model_name,
                hf_model=hf_model,
                tokenizer=tokenizer,
                device=cfg.device,
                dtype=str_to_dtype(cfg.dtype),
            )
    # HookedTransformer.from_pretrained refuses paths, but the steps of its conversion accept them.
    with tempfile.TemporaryDirectory() as folder:
        hf_model.config.save_pretrained(folder)
        tl_cfg = tl_loading.get_pretrained_model_config(
            folder, device=cfg.device, dtype=str_to_dtype(cfg.dtype)
        )
        state_dict = tl_loading.get_pretrained_state_dict(folder, tl_cfg, hf_model)
    tl_cfg.tokenizer_name = cfg.model_name
    model = HookedTransformer(tl_cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        state_dict,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model
