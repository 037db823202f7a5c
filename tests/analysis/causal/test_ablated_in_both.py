"""A latent ablated in both models: the rise of each loss, against Hugging Face's own models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_lens_dfc.analysis.causal.ablated_in_both import ablated_in_both
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig, ModelName
from sae_lens_dfc.models.hooked_model import HookedModel

TEXTS = ["The cat sat on the mat.", "In 1989 the cat", "the mat then The the"]
"""The last segment of the last has several tokens in both models."""
ACTIVATION = 2.0


@pytest.fixture(scope="module")
def windows(pair: ModelPair) -> list[Segments]:
    return [pair.segments(text)[0].after(pair.bos_segment) for text in TEXTS]


@pytest.fixture(scope="module")
def crosscoder(pair: ModelPair) -> Crosscoder:
    """One latent that fires by 2 at every pair, and one that is silent."""
    torch.manual_seed(0)
    d_in = pair.d_a + pair.d_b
    cfg = CrosscoderConfig(d_in=d_in, d_sae=2, d_a=pair.d_a, d_b=pair.d_b)
    crosscoder = Crosscoder(cfg)
    crosscoder.W_enc.data = torch.zeros(d_in, 2)
    crosscoder.b_enc.data = torch.tensor([ACTIVATION, -1.0])
    crosscoder.W_dec.data = torch.randn(2, d_in)
    return crosscoder


@torch.no_grad()
def loss(model: HookedModel, folder: str, window: Segments, m: ModelName, change: Tensor) -> float:
    """Of the window's last segment, by Hugging Face's model with the block's output changed at the
    last token of each segment after the first position."""
    alone: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids, ends = (window.ids_a, window.ends_a) if m == "a" else (window.ids_b, window.ends_b)
    last = [end - 1 for end in ends if end > 1]

    def hook(_module: object, _args: object, output: object) -> object:
        acts = output[0] if isinstance(output, tuple) else output
        assert isinstance(acts, Tensor)
        acts[:, last] += change
        return output

    layer = int(model.hook_name.split(".")[1])
    blocks = alone.model.layers if m == "a" else alone.transformer.h
    handle = blocks[layer].register_forward_hook(hook)
    log_p = alone(torch.tensor([ids.tolist()])).logits[0].log_softmax(dim=-1)
    handle.remove()
    return -sum(log_p[i - 1, ids[i]].item() for i in range(ends[-2], ends[-1]))


def test_the_rise_is_that_of_the_loss_of_the_last_segment(
    pair: ModelPair,
    crosscoder: Crosscoder,
    windows: list[Segments],
    llama_config: ModelConfig,
    gpt2_config: ModelConfig,
) -> None:
    found = ablated_in_both(crosscoder, pair, 0, windows)
    folders = {"a": llama_config.model_name, "b": gpt2_config.model_name}
    assert all(len(x) > 1 for x in (windows[-1][-1].ids_a, windows[-1][-1].ids_b))
    for m, model in pair.models.items():
        rises, decoder = getattr(found, m), crosscoder.W_dec.data[0, crosscoder.partition.models[m]]
        for window, rise in zip(windows, rises.tolist(), strict=True):
            before = loss(model, folders[m], window, m, torch.zeros_like(decoder))
            after = loss(model, folders[m], window, m, -ACTIVATION * decoder)
            assert rise == pytest.approx(after - before, rel=1e-3, abs=1e-4)
            assert abs(rise) > 1e-3


def test_a_model_loses_nothing_by_what_it_does_not_write(
    pair: ModelPair, crosscoder: Crosscoder, windows: list[Segments]
) -> None:
    one_sided = Crosscoder(crosscoder.cfg)
    one_sided.load_state_dict(crosscoder.state_dict())
    one_sided.W_dec.data[0, : pair.d_a] = 0
    found = ablated_in_both(one_sided, pair, 0, windows)
    assert found.a.tolist() == [0.0] * len(TEXTS) and found.b.abs().min() > 0


def test_texts_in_which_the_latent_is_silent_are_left_out(
    pair: ModelPair, crosscoder: Crosscoder, windows: list[Segments]
) -> None:
    found = ablated_in_both(crosscoder, pair, 1, windows)
    assert len(found.a) == len(found.b) == 0
