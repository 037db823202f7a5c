"""Finds a PEFT adapter, such as a LoRA, and merges it into its base."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from sae_lens_dfc.core.parsing import read_object, sha256_of
from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by
from sae_lens_dfc.models.opening.model_files import WEIGHT_FILES as WHOLE
from sae_lens_dfc.models.opening.model_files import check_model_file
from sae_lens_dfc.models.opening.pretrained import (
    Pretrained,
    Unusable,
    load_pretrained,
    read_config,
    some_names,
)

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ADAPTER_FILES = ("adapter_*", "*token*", "*.model", "vocab.*", "merges.txt", "chat_template.*")
WRAPPER = ".modules_to_save."
KEYS_SHOWN = 3
"""Number of folders that a message names."""
INSTALL_PEFT = "pip install 'sae-lens-dfc[peft]'"


@dataclass(frozen=True)
class Adapter:
    """An adapter on this machine, and its base."""

    name: str
    """Hub name or folder that the caller gave."""
    folder: Path
    """Folder that holds its files."""
    revision: str | None
    """Commit of a hub adapter."""
    base: str
    """Hub name or folder of the model that it was trained on."""
    base_revision: str | None
    """Branch, tag or commit of that model."""
    has_tokenizer: bool
    """Whether its folder holds a tokenizer, which may have tokens that the base's tokenizer
    lacks."""


@dataclass(frozen=True)
class Merged:
    """The adapter and base that a model was merged from, as a crosscoder and a cache record
    them."""

    adapter: str
    """Hub name or folder of the adapter."""
    adapter_revision: str | None
    """Commit of a hub adapter."""
    adapter_sha256: str
    """SHA-256 of its weights file."""
    base: str
    """Hub name or folder of the model that it was merged into."""
    base_revision: str | None
    """Commit of a base on a hub."""


def find_adapter(
    name: str,
    revision: str | None = None,
    subfolder: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
) -> Adapter | None:
    """Find the adapter with a given name; none if the name is that of a whole model, or nothing has
    that name.

    Args:
        name: Hub name or folder.
        revision: Branch, tag or commit of a hub adapter.
        subfolder: Folder of the repository that holds the adapter.
        base: The model to merge it into, instead of the one that adapter_config.json names.
        base_revision: Branch, tag or commit of the base.

    Raises:
        ValueError: A base or a subfolder is given and there is no adapter; or the folder also holds
            a whole model; or no base is given or named.
    """
    inside = subfolder or ""
    config = None
    if Path(name).is_dir() or is_hub_name(name):
        config = find_adapter_config_file(name, revision=revision, subfolder=inside)
    if config is None:
        elsewhere = sorted(path.parent.name for path in Path(name).glob(f"*/{CONFIG}"))
        if elsewhere and (subfolder or not (Path(name) / "config.json").is_file()):
            raise ValueError(
                f"{name!r} has no {Path(inside, CONFIG)}, and an adapter in {', '.join(map(repr, elsewhere[:KEYS_SHOWN]))}. Name its "
                "folder as the model's `adapter_subfolder`."
            )
        if base or subfolder:
            given = f"base={base!r}" if base else f"adapter_subfolder={subfolder!r}"
            raise ValueError(
                f"{given} is for an adapter, and {name!r} has no {Path(inside, CONFIG)} that can be read. Leave it out, or name an "
                "adapter; if it is one on a hub, check that the hub can be reached."
            )
        return None
    folder, commit = Path(config).parent, None
    if not Path(name).is_dir():
        patterns = [str(Path(inside, pattern)) for pattern in ADAPTER_FILES]
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        folder, commit = snapshot / inside, snapshot.name
    values = read_object(folder / CONFIG)
    if any((folder / file).is_file() for file in WHOLE):
        raise ValueError(
            f"{folder} holds both a whole model and an adapter ({CONFIG}). Keep one of them in it."
        )
    named, its_revision = values.get("base_model_name_or_path"), values.get("revision")
    if base is None and (not isinstance(named, str) or not named):
        raise ValueError(
            f"{folder / CONFIG} names no base model. Give the one it was trained on as the model's `base`."
        )
    its_base = base or str(named)
    if its_base == name or (
        Path(its_base).exists() and Path(its_base).resolve() == folder.resolve()
    ):
        raise ValueError(
            f"Adapter {name!r} names itself as its base. Give the model that it was trained on as the model's `base`."
        )
    return Adapter(
        name,
        folder,
        commit,
        its_base,
        base_revision or (its_revision if base is None and isinstance(its_revision, str) else None),
        any((folder / file).is_file() for file in TOKENIZER),
    )


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a repository on the hub, and not of a file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def load_merged(adapter: Adapter, dtype: str) -> tuple[Pretrained, Merged]:
    """Load the base of an adapter and merge the adapter into it.

    Args:
        adapter: What `find_adapter` found.
        dtype: Dtype in which the base is loaded and the adapter is merged.

    Returns:
        The merged model, whose weights have the names and shapes of the base's, and the adapter and
        base it was merged from.

    Raises:
        Unusable: peft is not installed; the base cannot be loaded; or the adapter is of a kind that
            cannot be merged, lacks weights, or does not fit the base.
    """
    config, weights = _mergeable_config(adapter), _weights_of(adapter)
    with naming_base(adapter):
        base = load_pretrained(adapter.base, adapter.base_revision, dtype)
    commit = getattr(base.model.config, "_commit_hash", None)
    made_of = Merged(
        adapter.name,
        adapter.revision,
        sha256_of(weights),
        adapter.base,
        commit or adapter.base_revision,
    )
    model = _merge(base.model, adapter, config)
    note = f"Adapter {adapter.name!r} ({_kind(config)}) was merged into {adapter.base!r}."
    return Pretrained(model, (*base.notes, note)), made_of


def _mergeable_config(adapter: Adapter) -> "PeftConfig":
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise Unusable(
            f"{adapter.name!r} is an adapter, and to open one needs peft. Install it: {INSTALL_PEFT}."
        ) from error
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"adapter {adapter.name!r} has an {CONFIG} that peft {version('peft')} cannot read: {type(error).__name__}: "
            f"{said_by(error)} Update peft, or save the adapter again."
        ) from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise Unusable(
            f"adapter {adapter.name!r} is {_kind(config)}, which changes what the model reads and none of its weights, so it "
            "cannot be merged. Give a LoRA or another adapter of weights."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise Unusable(
            f"adapter {adapter.name!r} works only after its invocation tokens (aLoRA), so it cannot be merged. Give a "
            "LoRA or another adapter that works at all tokens."
        )
    return config


def _kind(config: "PeftConfig") -> str:
    return getattr(config.peft_type, "value", str(config.peft_type))


def base_config(adapter: Adapter) -> PretrainedConfig:
    """Read the configuration of an adapter's base.

    Raises:
        Unusable: The configuration cannot be read, or the base's weights are quantized, so that no
            adapter can be merged into them.
    """
    with naming_base(adapter):
        config = read_config(adapter.base, adapter.base_revision)
    if getattr(config, "quantization_config", None) is not None:
        raise Unusable(
            f"adapter {adapter.name!r} cannot be merged into {adapter.base!r}, whose weights are quantized. Give the "
            "same model unquantized as the model's `base`."
        )
    return config


@contextmanager
def naming_base(adapter: Adapter) -> Iterator[None]:
    """Raise any error with an adapter's base again as one that names the base and its adapter.

    Raises:
        Unusable: Another exception was raised inside the block.
    """
    try:
        yield
    except Exception as error:
        raise Unusable(
            f"could not load {adapter.base!r}, the base of adapter {adapter.name!r}: {said_by(error, MOST_OF_OURS)} Say where the base "
            "is now as the model's `base`."
        ) from error


def _merge(model: PreTrainedModel, adapter: Adapter, config: "PeftConfig") -> PreTrainedModel:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    config.inference_mode = True
    saved = load_peft_weights(str(adapter.folder), device="cpu")
    try:
        _resize(model, saved)
        with warnings.catch_warnings():
            # peft warns of missing weights and initializes them at random; they are refused below.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            warnings.simplefilter("ignore", FutureWarning)  # from transformers, called by peft
            adapted = PeftModel(model, config)
            _check_shapes(get_peft_model_state_dict(adapted, save_embedding_layers=False), saved)
            loaded = adapted.load_adapter(str(adapter.folder), "default", torch_device="cpu")
    except Exception as error:
        raise Unusable(_misfit(adapter, said_by(error, MOST_OF_OURS))) from error
    if loaded.missing_keys:
        lacks = some_names(sorted(loaded.missing_keys))
        raise Unusable(
            _misfit(
                adapter,
                f"it lacks {lacks}. Copy the adapter's weights again if they are not all there.",
            )
        )
    # A fully trained embedding is saved twice, once under a name that only peft uses.
    twice = {key for key in saved if WRAPPER in key and key.replace(WRAPPER, ".") in saved}
    extra = {*loaded.unexpected_keys} - twice
    if extra:
        named = some_names(sorted(extra))
        raise Unusable(_misfit(adapter, f"the base has no place for {named}."))
    return adapted.merge_and_unload()  # type: ignore[return-value]


def _check_shapes(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuse weights whose shapes differ from those that adapter_config.json and the base imply."""
    wrong = [
        f"{name} is {list(weight.shape)} and would be {list(expected[name].shape)}"
        for name, weight in sorted(saved.items())
        if name in expected and expected[name].shape != weight.shape
    ]
    if wrong:
        raise Unusable(
            f"it has {some_names(wrong)} of another shape than the base and the rank in its {CONFIG} give. Is that file the "
            "one that was saved with the weights?"
        )


def _misfit(adapter: Adapter, reason: str) -> str:
    return (
        f"adapter {adapter.name!r} does not fit its base {adapter.base!r}: {reason} Give the causal language model that it "
        "was trained on as the model's `base`."
    )


def _resize(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> None:
    """Resize the base's embedding to that of the adapter, if tokens were added in its training."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    whole = [saved[key] for key in saved if key.endswith(f"{name}.weight")]
    low_rank = [saved[key].T for key in saved if key.endswith(f"{name}.lora_embedding_A")]
    n_rows = {len(weight) for weight in (*whole, *low_rank)} - {embedding.num_embeddings}
    if not n_rows:
        return
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if not whole or not (is_tied or any(key.endswith("head.weight") for key in saved)):
        raise Unusable(
            f"it was trained with {max(n_rows)} tokens, the base has {embedding.num_embeddings}, and the adapter does not "
            "hold the whole embedding and head."
        )
    # The new rows are random until the adapter's replace them.
    model.resize_token_embeddings(max(n_rows), mean_resizing=False)


def _weights_of(adapter: Adapter) -> Path:
    for file in ADAPTER_WEIGHTS:
        path = adapter.folder / file
        if path.is_file():
            try:
                check_model_file(path)
            except ValueError as error:
                raise Unusable(
                    f"adapter {adapter.name!r}: {said_by(error, MOST_OF_OURS)}"
                ) from error
            return path
    raise Unusable(
        f"{adapter.folder} has an {CONFIG} and no {ADAPTER_WEIGHTS[0]}. Copy the adapter's weights into it."
    )
