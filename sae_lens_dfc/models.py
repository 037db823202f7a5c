"""One hooked model: how to open it, where it is read, and what it says when something does not fit."""

import difflib
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, str_to_dtype
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_dfc.files import read_text
from sae_lens_dfc.gguf_file import check_gguf
from sae_lens_dfc.texts import first_line
from sae_lens_dfc.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    LanguageModel = HookedTransformer | TransformerBridge
else:
    # TransformerLens 4 has no HookedTransformer: it is imported where it is asked for.
    LanguageModel = nn.Module

WEIGHTS = ("*.safetensors", "*.bin")
PARAMETERS_OF_A_BYTE = 8
"""Of the tightest packing."""
SMALL = 50_000_000
"""Numbers that need not be in any file: of a test's model, or of masks and positions that are computed."""
MAX_LAYERS = 2000
MAX_TEMPLATE = 1_000_000
"""Bytes of a chat template: long ones have some 20,000."""


@dataclass
class ModelConfig:
    """Where one of the two models comes from and where it is read."""

    model_name: str = ""
    """Hub name, folder, or .gguf file."""
    hook_name: str = ""
    """TransformerLens hook whose activations are read, e.g. blocks.9.hook_resid_post; empty for the middle block's output."""
    model_class_name: Literal["TransformerBridge", "HookedTransformer"] = "TransformerBridge"
    """TransformerLens class that runs the model; it removes HookedTransformer in 4.0."""
    dtype: str = "float32"
    """Number format in which the model runs."""
    device: str = "cpu"
    """Device on which the model runs."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    prepend_bos: bool = True
    """Whether each context starts with the tokenizer's beginning-of-sequence token, where it has one."""
    drop_unused_layers: bool = False
    """Free the memory of the layers above the hook, which are not run; the model can then do nothing else."""
    chat_template: str | None = None
    """Jinja chat template, or a file that holds one, for a tokenizer that has none; none takes the tokenizer's own."""


@dataclass
class HookedModel:
    """A language model, the hook at which it is read, and its tokenizer.

    Raises:
        ValueError: The hook is not in the model, is not one vector for each token, or the model has no tokenizer.
    """

    model: LanguageModel = field(repr=False)
    """The model, already loaded."""
    hook_name: str = ""
    """TransformerLens hook whose activations are read; the middle block's output when empty."""
    name: str = ""
    """What to call the model; its own name when empty."""
    prepend_bos: bool = True
    """Whether each context starts with the beginning-of-sequence token."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    autocast: bool = False
    """Whether the forward pass runs in bfloat16 where torch deems it safe."""

    def __post_init__(self) -> None:
        self.model.eval()
        self.name = self.name or str(self.model.cfg.model_name)
        self.hook_name = self.hook_name or f"blocks.{self.n_layers // 2}.hook_resid_post"
        if self.model.tokenizer is None:
            raise ValueError(
                f"Model {self.name!r} has no tokenizer. Load it with one, e.g. "
                "TransformerBridge.boot_transformers(name, tokenizer=AutoTokenizer.from_pretrained(name))."
            )
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer of model {self.name!r} cannot map tokens back to characters (it is not a fast "
                "tokenizer). Load the model with a fast one."
            )
        self._check_hook()

    def _check_hook(self) -> None:
        hooks = set(self.model.hook_dict)
        if self.hook_name not in hooks:
            close = difflib.get_close_matches(self.hook_name, hooks, n=3)
            raise ValueError(
                f"Hook {self.hook_name!r} is not in model {self.name!r} ({self.n_layers} layers: blocks.0 to "
                f"blocks.{self.n_layers - 1}). {'Close: ' + ', '.join(sorted(close)) + '.' if close else ''}"
                f"The output of a middle block is blocks.{self.n_layers // 2}.hook_resid_post."
            )
        _ = self.d_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer  # type: ignore[return-value]

    @property
    def n_layers(self) -> int:
        return int(self.model.cfg.n_layers)

    @property
    def n_ctx(self) -> int:
        """Most tokens the model can read at once."""
        return int(self.model.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The token that starts each context, or none."""
        bos = self.tokenizer.bos_token_id
        # TransformerLens gives a tokenizer without one a new token, which the model has no embedding for.
        known = bos is not None and int(bos) < self.model.cfg.d_vocab  # type: ignore[arg-type]
        return (int(bos),) if self.prepend_bos and known else ()  # type: ignore[arg-type]

    @cached_property
    def d_model(self) -> int:
        """Width of the activations at the hook, measured on three tokens."""
        ids = torch.zeros(1, 3, dtype=torch.long)
        acts = self._run(ids, torch.ones_like(ids))
        if acts.ndim not in (3, 4) or acts.shape[:2] != ids.shape:
            raise ValueError(
                f"Hook {self.hook_name!r} of model {self.name!r} gives shape {tuple(acts.shape)} for 3 tokens, "
                "not one vector for each token. Choose a hook such as hook_resid_post, hook_mlp_out or hook_z."
            )
        return acts[0, 0].numel()

    @property
    def weight_processing(self) -> str:
        """What TransformerLens did to the weights; activations before and after it do not compare."""
        if isinstance(self.model, TransformerBridge):
            return "compatibility_mode" if self.model.compatibility_mode else "none"
        return "folded" if str(self.model.cfg.normalization_type).endswith("Pre") else "none"

    @torch.no_grad()
    def activations(
        self, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Activations at the hook; the forward pass stops there.

        Args:
            ids: Token ids, padded on the right.
            mask: 1 for a token, 0 for padding.
        """
        return self._run(ids, mask).flatten(start_dim=2)

    @torch.no_grad()
    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            _, cache = self.model.run_with_cache(
                ids.to(self.device),
                names_filter=[self.hook_name],
                stop_at_layer=self._stop_at_layer,
                # Explicit: left to itself TransformerLens guesses padding from the tokenizer's padding side.
                attention_mask=mask.to(self.device),
                return_cache_object=False,
            )
        return cache[self.hook_name]

    @property
    def _stop_at_layer(self) -> int | None:
        """The first layer that is not run; none runs all."""
        return extract_stop_at_layer_from_tlens_hook_name(self.hook_name)

    def compile(self, mode: str | None) -> None:
        """Compile the forward pass. As SAELens does, its `run_with_cache`: nothing else of it is called."""
        self.model.run_with_cache = torch.compile(self.model.run_with_cache, mode=mode)  # type: ignore[method-assign]

    def drop_unused_layers(self) -> None:
        """Free the memory of the layers above the hook. The model still says how many layers it had."""
        stop = self._stop_at_layer
        if stop is None:
            return
        _ = self._weights_sha256  # of the whole model, which is what it was trained on
        # TransformerBridge stops when it comes to the layer after the last one run: that one must be there.
        first = stop + isinstance(self.model, TransformerBridge)
        if first > len(self.model.blocks):
            return  # nothing stops it after its last block, and it runs to its end
        dropped = [*self.model.blocks[first:], self.model.unembed]
        del self.model.blocks[first:]
        others = [m for m in self.model.children() if m is not self.model.unembed]
        kept = {id(p) for module in others for p in module.parameters()}
        # Emptied, since TransformerLens holds on to the modules in other places.
        for parameter in (p for module in dropped for p in module.parameters()):
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)

    def describe(self) -> dict[str, Any]:
        """What a crosscoder keeps of the model it was trained on, to recognise it later."""
        return {
            "model_name": self.name,
            "revision": self.revision,
            "model_class_name": type(self.model).__name__,
            "hook_name": self.hook_name,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "prepend_bos": self.prepend_bos,
            "weight_processing": self.weight_processing,
            "tokenizer_sha256": self._tokenizer_sha256,
            "weights_sha256": self._weights_sha256,
        }

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self.tokenizer)  # a large vocabulary takes a second

    @cached_property
    def _weights_sha256(self) -> str:
        # 64 values of each tensor tell two models apart without reading gigabytes; in bfloat16, so that a model
        # loaded in float32 or bfloat16 is the same (in float16 it is not: that rounds in between).
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.named_parameters()):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(name.encode())
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of how a tokenizer cuts text: its vocabulary and rules, not its settings for padding."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    relevant = {k: state[k] for k in ("added_tokens", "model", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def load_model(cfg: ModelConfig) -> HookedModel:
    """Open a model by hub name, folder or GGUF file. Code that comes with a model is not run.

    Raises:
        ValueError: It cannot be opened, or does not fit; the message says what to give instead.
    """
    if not cfg.model_name:
        raise ValueError("A model has no name. Set model_a.model_name and model_b.model_name.")
    chat_template = None if cfg.chat_template is None else read_chat_template(cfg.chat_template)
    tokenizer = load_tokenizer(cfg.model_name, cfg.revision)
    # Asked before TransformerLens gets the tokenizer: it invents such a token where there is none.
    has_bos = tokenizer.bos_token_id is not None
    wrap = _to_bridge if cfg.model_class_name == "TransformerBridge" else _to_hooked_transformer
    # What is dropped never comes to the device.
    device = "cpu" if cfg.drop_unused_layers else cfg.device
    try:
        model = wrap(_load_hf_model(cfg).to(device), tokenizer, replace(cfg, device=device))  # type: ignore[arg-type]
    except Exception as error:
        raise _not_loaded(cfg, error) from error
    if chat_template is not None:
        # Only now: TransformerLens may have loaded the tokenizer again, as its files have it.
        model.tokenizer.chat_template = chat_template  # type: ignore[union-attr]
    hooked = HookedModel(
        model=model,
        hook_name=cfg.hook_name,
        name=Path(cfg.model_name).name if Path(cfg.model_name).exists() else cfg.model_name,
        prepend_bos=cfg.prepend_bos and has_bos,
        revision=cfg.revision,
    )
    if cfg.drop_unused_layers:
        hooked.drop_unused_layers()
        try:
            hooked.model.to(cfg.device)
        except Exception as error:
            raise _not_loaded(cfg, error) from error
    return hooked


def _not_loaded(cfg: ModelConfig, error: Exception) -> ValueError:
    return ValueError(
        f"Could not load model {cfg.model_name!r} as {cfg.model_class_name} on {cfg.device!r}: "
        f"{type(error).__name__}: {first_line(error)} "
        "Give a hub name, a folder with config.json and weights, or a .gguf file."
    )


def read_chat_template(template_or_file: str) -> str:
    """A Jinja template as it is, or the text of the file with that name.

    Raises:
        ValueError: It is neither.

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


def _load_hf_model(cfg: ModelConfig) -> PreTrainedModel:
    path = Path(cfg.model_name)
    # eager: TransformerBridge runs attention this way, and another kernel differs by 1e-3.
    kwargs: dict[str, Any] = {"dtype": str_to_dtype(cfg.dtype), "attn_implementation": "eager"}
    # Left out, transformers asks on the terminal: nobody may be there, or a program that says yes.
    kwargs["trust_remote_code"] = False
    if path.suffix == ".gguf" and path.is_file():
        check_gguf(path)
        _check_room(path.parent, [path], gguf_file=path.name)
        return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **kwargs)
    if path.is_dir():
        _check_room(path, [file for end in WEIGHTS for file in path.glob(end)])
    return AutoModelForCausalLM.from_pretrained(cfg.model_name, revision=cfg.revision, **kwargs)


def _check_room(folder: Path, weights: Sequence[Path], **of_config: Any) -> None:
    """Refuse a model that claims many more parameters than its files have bytes for: transformers makes up the rest, in memory.

    Raises:
        ValueError: It does.
    """
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, **of_config)
    n_bytes = sum(path.stat().st_size for path in weights)
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(n_layers, int) or n_layers > MAX_LAYERS:
        raise ValueError(f"it claims {n_layers!r:.80} layers.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    n_numbers = sum(x.numel() for x in chain(model.parameters(), model.buffers()))
    if n_numbers > PARAMETERS_OF_A_BYTE * n_bytes + SMALL:
        raise ValueError(
            f"it claims {n_numbers:,} parameters, and its files have {n_bytes:,} bytes. Is a file of weights missing?"
        )


def _to_bridge(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig
) -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        cfg.model_name,
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=cfg.device,
        dtype=str_to_dtype(cfg.dtype),
    )


def _to_hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig
) -> LanguageModel:
    try:
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as tl_loading
    except ImportError as error:
        raise ValueError(
            f"model_class_name='HookedTransformer' is asked for, and this TransformerLens has none ({error}). Use "
            "model_class_name='TransformerBridge'."
        ) from error
    if not Path(cfg.model_name).exists():
        with redirect_stdout(sys.stderr):  # it prints what it loaded, among what a command answers
            return HookedTransformer.from_pretrained_no_processing(
                cfg.model_name,
                hf_model=hf_model,
                tokenizer=tokenizer,
                device=cfg.device,
                dtype=str_to_dtype(cfg.dtype),
            )
    # HookedTransformer.from_pretrained refuses paths; its own conversion, called step by step, does not.
    with tempfile.TemporaryDirectory() as folder:
        # A GGUF file does not name it, and TransformerLens chooses its conversion by it.
        hf_model.config.architectures = [type(hf_model).__name__]
        hf_model.config.save_pretrained(folder)
        try:
            tl_cfg = tl_loading.get_pretrained_model_config(
                folder, device=cfg.device, dtype=str_to_dtype(cfg.dtype)
            )
        except NotImplementedError as error:
            raise ValueError(
                f"HookedTransformer cannot open {cfg.model_name!r} from disk: {error} "
                "Use model_class_name='TransformerBridge'."
            ) from error
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
