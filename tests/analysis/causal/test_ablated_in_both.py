"""A latent ablated in both models: the rise of each loss, against Hugging Face's own models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_lens_dfc.analysis.causal.ablated_in_both import ablated_in_both
from sae_lens_dfc.analysis.causal.activation_patching import Texts, texts_of
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig, ModelName
from sae_lens_dfc.models.hooked_model import HookedModel

TEXTS = ["The cat sat on the mat.", "In 1989 the cat", "the mat then The the"]
"""The last segment of the last has several tokens in both models."""


@pytest.fixture(scope="module")
def crosscoder(pair: ModelPair) -> Crosscoder:
    """Latent 0 fires at every pair, more or less strongly; latent 1 is silent."""
    torch.manual_seed(0)
    d_in = pair.d_a + pair.d_b
    crosscoder = Crosscoder(CrosscoderConfig(d_in=d_in, d_sae=2, d_a=pair.d_a, d_b=pair.d_b))
    crosscoder.W_enc.data = torch.stack([torch.randn(d_in), torch.zeros(d_in)], dim=1)
    crosscoder.b_enc.data = torch.tensor([20.0, -1.0])
    crosscoder.W_dec.data = 0.1 * torch.randn(2, d_in)
    return crosscoder


@pytest.fixture(scope="module")
def texts(pair: ModelPair, crosscoder: Crosscoder) -> Texts:
    windows = [pair.segments(text)[0].after(pair.bos_segment) for text in TEXTS]
    found = texts_of(crosscoder, pair, 0, windows, n_after=1)
    assert len(found.rows.contexts) == len(TEXTS)
    assert found.feature_acts.min() > 0 and found.feature_acts.std() > 0.1
    return found


@torch.no_grad()
def loss(model: HookedModel, folder: str, window: Segments, m: ModelName, changes: Tensor) -> float:
    """Of the window's last segment, by Hugging Face's model, with a change of the block's output at
    the last token of each segment after the first position."""
    alone: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids, ends = (window.ids_a, window.ends_a) if m == "a" else (window.ids_b, window.ends_b)
    last = [end - 1 for end in ends if end > 1]

    def hook(_module: object, _args: object, output: object) -> object:
        acts = output[0] if isinstance(output, tuple) else output
        assert isinstance(acts, Tensor)
        acts[:, last] += changes
        return output

    layer = int(model.hook_name.split(".")[1])
    blocks = alone.model.layers if m == "a" else alone.transformer.h
    handle = blocks[layer].register_forward_hook(hook)
    log_p = alone(torch.tensor([ids.tolist()])).logits[0].log_softmax(dim=-1)
    handle.remove()
    return -sum(log_p[i - 1, ids[i]].item() for i in range(ends[-2], ends[-1]))


def test_rises_are_those_of_the_loss_of_the_last_segment(
    pair: ModelPair,
    crosscoder: Crosscoder,
    texts: Texts,
    llama_config: ModelConfig,
    gpt2_config: ModelConfig,
) -> None:
    found = ablated_in_both(crosscoder, pair, 0, texts, [1])
    folders = {"a": llama_config.model_name, "b": gpt2_config.model_name}
    last = texts.rows.contexts[-1].segments[-1]
    assert min(len(last.ids_a), len(last.ids_b)) > 1
    for m, model in pair.models.items():
        own, other = crosscoder.W_dec.data[:, crosscoder.partition.models[m]]
        scaled = other * own.norm() / other.norm()
        for decoder, rises in ((own, found[m].latent), (scaled, found[m].controls[0])):
            for context, rise in zip(texts.rows.contexts, rises.tolist(), strict=True):
                f = texts.feature_acts[texts.rows.context == context.number]
                changes = -f[:, None] * decoder
                before, after = (
                    loss(model, folders[m], context.segments, m, x)
                    for x in (torch.zeros_like(changes), changes)
                )
                assert rise == pytest.approx(after - before, rel=1e-3, abs=1e-4)
                assert abs(rise) > 1e-3


def test_a_model_loses_nothing_by_what_is_not_written_into_it(
    pair: ModelPair, crosscoder: Crosscoder, texts: Texts
) -> None:
    one_sided = Crosscoder(crosscoder.cfg)
    one_sided.load_state_dict(crosscoder.state_dict())
    one_sided.W_dec.data[0, : pair.d_a] = 0
    found = ablated_in_both(one_sided, pair, 0, texts, [1])
    assert found["a"].latent.tolist() == found["a"].controls[0].tolist() == [0.0] * len(TEXTS)
    assert found["b"].latent.abs().min() > 0


def test_a_text_with_an_infinite_loss_is_left_out(
    pair: ModelPair, crosscoder: Crosscoder, texts: Texts
) -> None:
    whole = ablated_in_both(crosscoder, pair, 0, texts, [1])
    broken = texts.acts["b"].clone()
    broken[1] = torch.nan
    found = ablated_in_both(
        crosscoder, pair, 0, texts._replace(acts={**texts.acts, "b": broken}), [1]
    )
    for m in pair.models:
        assert found[m].latent.tolist() == whole[m].latent[[0, 2]].tolist()
        assert found[m].controls.shape == (1, 2)


def test_only_texts_in_which_it_fires_before_the_last_segment_are_kept(
    pair: ModelPair, crosscoder: Crosscoder
) -> None:
    windows = [pair.segments(text)[0].after(pair.bos_segment) for text in TEXTS]
    reads = texts_of(crosscoder, pair, 0, windows, n_after=1)
    at = {c.number: len(c.segments) - 2 for c in reads.rows.contexts}
    before_last = torch.tensor([at[c] for c in reads.rows.context.tolist()])
    acts = reads.feature_acts[reads.rows.segment == before_last]
    some = Crosscoder(crosscoder.cfg)
    some.load_state_dict(crosscoder.state_dict())
    some.threshold.data[0] = acts.sort().values[1]
    kept = texts_of(some, pair, 0, windows, n_after=1).rows.contexts
    assert [c.number for c in kept] == [int(acts.argmax())]
