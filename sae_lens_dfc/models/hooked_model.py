"""Wraps a language model with its tokenizer and the hook at which its activations are read."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.core.machine import return_freed_memory
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.models.opening.adapters import Merged
from sae_lens_dfc.models.opening.fitting import check_reads_in_order, check_vocabulary, probe

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    LanguageModel = HookedTransformer | TransformerBridge
else:
    # TransformerLens 4 has no HookedTransformer, so it is imported only when requested.
    LanguageModel = nn.Module


@dataclass
class HookedModel:
    """A language model, the hook at which it is read, and its tokenizer.

    Raises:
        ValueError: The hook does not exist or does not give one vector per token, the model reads
            ahead, or its tokenizer is missing, not fast, or does not fit.
    """

    model: LanguageModel = field(repr=False)
    """The model, already loaded."""
    hook_name: str = ""
    """TransformerLens hook whose activations are read; if empty, the middle block's output."""
    name: str = ""
    """Display name of the model; if empty, its own name."""
    prepend_bos: bool = True
    """Whether each context starts with the beginning-of-sequence token."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    autocast: bool = False
    """Whether the forward pass runs in bfloat16 where torch deems it safe."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was fixed when it was opened."""
    merged: Merged | None = None
    """The adapter and base that it was merged from."""

    def __post_init__(self) -> None:
        self.model.eval()
        self.name = self.name or str(self.model.cfg.model_name)
        self.hook_name = self.hook_name or self._output_of_a_middle_block
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
        check_vocabulary(self.tokenizer, self.n_embeddings, self.name)
        self._check_hook()
        self._check_order()

    def _check_hook(self) -> None:
        hooks = set(self.model.hook_dict)
        if self.hook_name not in hooks:
            close = difflib.get_close_matches(self.hook_name, hooks, n=3)
            raise ValueError(
                f"Hook {self.hook_name!r} is not in model {self.name!r} ({self.n_layers} layers: blocks.0 to "
                f"blocks.{self.n_layers - 1}). {'Close: ' + ', '.join(sorted(close)) + '. ' if close else ''}"
                f"The output of a middle block is {self._output_of_a_middle_block}."
            )
        _ = self.d_model

    def _check_order(self) -> None:
        ids = probe(self.n_embeddings, self.n_ctx)
        acts = self._run(ids, torch.ones_like(ids)).flatten(start_dim=2)
        formats = {acts.dtype, *(p.dtype for p in self.model.parameters() if p.is_floating_point())}
        eps = max(torch.finfo(dtype).eps for dtype in formats)
        check_reads_in_order(acts, eps, self.hook_name, self.name)

    @property
    def _output_of_a_middle_block(self) -> str:
        block = f"blocks.{self.n_layers // 2}"
        post = f"{block}.hook_resid_post"
        # DeepSeek V4 has four parallel residual streams, concatenated in the output of each block.
        return post if post in self.model.hook_dict else f"{block}.hook_out"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer  # type: ignore[return-value]

    @property
    def n_layers(self) -> int:
        return int(self.model.cfg.n_layers)

    @property
    def n_ctx(self) -> int:
        """Maximum context length, in tokens."""
        return int(self.model.cfg.n_ctx)

    @cached_property
    def n_embeddings(self) -> int:
        """Number of embeddings; the tokenizer may have fewer tokens, or special tokens beyond."""
        # Not from the configuration, where TransformerLens counts the tokens of a replaced
        # tokenizer.
        return int(self.model.W_E.shape[0])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The beginning-of-sequence token that starts each context; empty if there is none."""
        bos = self.tokenizer.bos_token_id
        # To a tokenizer without one, TransformerLens adds a new token, for which the model has no
        # embedding.
        known = bos is not None and int(bos) < self.n_embeddings  # type: ignore[arg-type]
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
        """How TransformerLens processed the weights; activations with different processing are not
        comparable."""
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
                # Explicit, because TransformerLens would infer padding from the tokenizer's padding
                # side.
                attention_mask=mask.to(self.device),
                return_cache_object=False,
            )
        if self.hook_name not in cache:
            raise ValueError(
                f"Hook {self.hook_name!r} of model {self.name!r} is never reached in its forward pass. Choose another, such as "
                f"{self._output_of_a_middle_block}."
            )
        return cache[self.hook_name]

    @property
    def _stop_at_layer(self) -> int | None:
        """The first layer that is not run; None runs all layers."""
        return extract_stop_at_layer_from_tlens_hook_name(self.hook_name)

    def check_ids(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> None:
        """Refuse token ids for which the model has no embedding, such as those of an added special
        token.

        Raises:
            ValueError: There is such a token id.
        """
        largest = int(np.max(ids, initial=0))
        if largest >= self.n_embeddings:
            token = str(self.tokenizer.convert_ids_to_tokens(largest))
            raise ValueError(
                f"The text has {token!r}, token {largest} of model {self.name!r}, which has embeddings for {self.n_embeddings} tokens. "
                "Leave it out of the text, or resize the model's embeddings (resize_token_embeddings) and train them."
            )

    def compile(self, mode: str | None) -> None:
        """Compile the forward pass: only `run_with_cache`, as in SAELens, because nothing else is
        called."""
        self.model.run_with_cache = torch.compile(self.model.run_with_cache, mode=mode)  # type: ignore[method-assign]

    def drop_unused_layers(self, keep_unembedding: bool = False) -> None:
        """Free the memory of the layers above the hook; `n_layers` still counts them.

        Args:
            keep_unembedding: Keep the unembedding, for `direct_logit_effects`.
        """
        stop = self._stop_at_layer
        if stop is None:
            return
        _ = self._weights_sha256  # fingerprint the whole model, before layers are dropped
        # TransformerBridge stops on reaching the layer after the last one that is run, so that
        # layer is kept.
        first = stop + isinstance(self.model, TransformerBridge)
        if first > len(self.model.blocks):
            return  # the hook is in the last block, so the model runs to its end
        unembed = [] if keep_unembedding else [self.model.unembed]
        dropped = [*self.model.blocks[first:], *unembed]
        del self.model.blocks[first:]
        others = [m for m in self.model.children() if m not in unembed]
        kept = {id(p) for module in others for p in module.parameters()}
        # Emptied, because TransformerLens keeps other references to the modules.
        for parameter in (p for module in dropped for p in module.parameters()):
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)
        return_freed_memory()

    def describe(self) -> dict[str, Any]:
        """Description of the model that is saved with a crosscoder, to identify the model later."""
        return {
            "model_name": self.name,
            "revision": self.revision,
            **({} if self.merged is None else asdict(self.merged)),
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
        return tokenizer_sha256(self.tokenizer)  # cached, because a large vocabulary takes a second

    @cached_property
    def _weights_sha256(self) -> str:
        # 64 values of each tensor distinguish models without reading gigabytes. They are rounded to
        # bfloat16, so that a model loaded in float32 or bfloat16 has the same hash (in float16 it
        # does not, because that rounds first).
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.named_parameters()):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(name.encode())
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of how a tokenizer splits text: its vocabulary and rules, not its padding
    settings."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    relevant = {k: state[k] for k in ("added_tokens", "model", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def check_device(device: str) -> None:
    """Refuse a device that is not available, or that stores no data, such as torch's meta device.

    Raises:
        ValueError: The device is one of these.
    """
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it stores no data.")
    # torch without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} is not available: {said_by(error)} Give one that is, such as cpu."
        ) from error
