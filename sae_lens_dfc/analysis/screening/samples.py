"""Generates continuations that show what a latent does to a model."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_dfc.analysis.causal.activation_patching import ModelSpecificDirection, Texts
from sae_lens_dfc.analysis.report.findings import SteeringSample
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import changed
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.positions import positions_of
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.models.hooked_model import HookedModel

SAMPLED = Sampling(max_new_tokens=24, temperature=0.0)


@torch.no_grad()
def samples(
    pair: ModelPair, texts: Texts, own: ModelSpecificDirection, n: int = 2
) -> list[SteeringSample]:
    """Both models' continuations of the first texts, untouched and with the latent's model-specific
    part ablated or added.

    The change applies only at the text's positions, where the latent's activation is known, not at
    generated tokens.
    """
    found: list[SteeringSample] = []
    ways: list[tuple[ModelName, str, Tensor]] = [
        (own.source, "model-specific part ablated", -own.own),
        (OTHER[own.source], "model-specific part patched in", own.moved),
    ]
    for m, change, direction in ways:
        for i in range(min(n, len(texts.rows.contexts))):
            found.append(_sample(pair.models[m], m, change, texts, i, direction))
    return found


def _sample(
    model: HookedModel, m: ModelName, change: str, texts: Texts, i: int, direction: Tensor
) -> SteeringSample:
    reading = texts.readings[m]
    ids = reading.ids[i][reading.mask[i].bool()].tolist()
    here = reading.context == i
    edit = torch.zeros(len(ids), len(direction))
    edit[reading.position[here]] = texts.feature_acts[here, None] * direction.float().cpu()

    def written(acts: Tensor) -> Tensor:
        # Without a key-value cache, each pass also rereads the generated tokens.
        return acts + pad(edit, (0, 0, 0, acts.shape[1] - len(ids))).to(acts)

    [before] = answer(model, [ids], SAMPLED, seed=0)
    with changed(model, written, positions_of("prompt", [ids])):
        [after] = answer(model, [ids], SAMPLED, seed=0)
    prompt = model.tokenizer.decode(ids, skip_special_tokens=False)
    return SteeringSample(m, change, 1.0, str(prompt), before, after)
