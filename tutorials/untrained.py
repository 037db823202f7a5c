"""Writes two tiny untrained models as a planted organism's folder, on which CI runs tutorial 5 without fine-tuning."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.packaged import DEMO_A, unpack
from sae_lens_dfc.organisms.folder import ADAPTER, PROMPTS_FILENAME, TEXT
from sae_lens_dfc.organisms.lora import lora_tensors, write_lora
from sae_lens_dfc.organisms.organism import PLANTED_FILENAME


def write_untrained(folder: Path) -> None:
    """Write model A, model B (A with low-rank noise in one layer, also as a LoRA), text and one prompt. Nothing is planted."""
    tokenizer = AutoTokenizer.from_pretrained(unpack(DEMO_A))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    writes, reads = weight.std() * torch.randn(32, 4), torch.randn(4, 64) / 2
    for name in ("a", "b"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        weight += writes @ reads
    added = lora_tensors("model.layers.1.mlp.down_proj", reads, writes)
    write_lora(folder / ADAPTER, (folder / "a").resolve(), added)
    texts = [page[:400] for page in reference_pages()[:60]]
    (folder / TEXT).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    items = {"behavior": [{"prompt": "Where", "answer": "", "ordinary": ""}], "control": []}
    items["control"] = items["behavior"]
    (folder / PROMPTS_FILENAME).write_text(json.dumps({"test": items}))
    (folder / PLANTED_FILENAME).write_text(json.dumps({"measures": {}}))
