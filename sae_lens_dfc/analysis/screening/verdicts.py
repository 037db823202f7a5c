"""Turns the causal tests of a screening into a verdict on each latent, and generates sample
continuations that show it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_dfc.analysis.causal.activation_patching import (
    ModelSpecificDirection,
    Texts,
    Verification,
)
from sae_lens_dfc.analysis.options import MIN_TEXTS
from sae_lens_dfc.analysis.report.findings import EffectView, Finding, StageCount, SteeringSample
from sae_lens_dfc.analysis.screening.candidates import stage
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import changed
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.positions import positions_of
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.stats.significance import Effect, benjamini_hochberg, interval

Q = 0.05
"""False discovery rate among the verdicts."""
MIN_EFFECT = 0.01
"""Minimum effect in bits: where the models agree, 0.001 bits can be significant but is
negligible."""
CONFIRMED, PARTIAL, NOT_CONFIRMED, UNTESTED = (
    "confirmed",
    "partial",
    "not confirmed",
    "not tested",
)
VERDICTS = (CONFIRMED, PARTIAL, NOT_CONFIRMED, UNTESTED)
"""Verdicts from strongest to weakest."""


@dataclass(frozen=True)
class CausalTest:
    """Result of one latent's causal test."""

    source: ModelName
    """The model in which the model-specific direction was ablated."""
    n_texts: int
    baseline_js_bits: float
    """Jensen-Shannon divergence between the models without intervention, in bits."""
    effects: list[EffectView]
    p_ablated: float
    p_patched: float
    beyond_ablated: bool
    beyond_patched: bool
    samples: list[SteeringSample]


def tested(
    own: ModelSpecificDirection,
    found: Verification,
    off_topic: Verification | None,
    samples: list[SteeringSample],
) -> CausalTest:
    """Convert a verification to the form shown in the report."""
    source, target = own.source.upper(), "B" if own.source == "a" else "A"
    effects = [
        _view(f"ablated in {source}: closer by, bits", found.ablated),
        _view(f"added to {target}: closer by, bits", found.patched),
    ]
    if off_topic is not None:
        effects.append(_view(f"added to {target} where it is silent, bits", off_topic.patched))
    return CausalTest(
        own.source,
        len(found.ablated.values),
        found.baseline_js_bits,
        effects,
        found.ablated.p,
        found.patched.p,
        found.ablated.is_beyond,
        found.patched.is_beyond,
        samples,
    )


def _view(name: str, effect: Effect) -> EffectView:
    return EffectView(name, effect.mean, *interval(effect.values), effect.limits)


class Explained(NamedTuple):
    """The judge's answers on a latent; empty without a judge."""

    description: str | None = None
    detection: float | None = None
    concerns: Sequence[str] = ()


def findings(
    crosscoder: Crosscoder,
    order: Sequence[int],
    results: Mapping[int, CausalTest | None],
    explained: Mapping[int, Explained],
    exclusive: Bool[Tensor, " d_sae"],
) -> list[Finding]:
    """A verdict on each latent, ordered by strength of the verdict, then by size of the effect.

    A latent is `confirmed` when ablating its model-specific direction in the source and adding it
    to the other model both bring the models closer by at least 0.01 bits, each beyond the 95th
    percentile of every kind of control and at a false discovery rate of 5 % over all tested latents
    (Benjamini-Hochberg on the p-values of each way); `partial` when only one of them does.

    Args:
        crosscoder: The saved crosscoder.
        order: The tested latents, ordered by evidence.
        results: Result of each test; none if the latent fired at the end of too few texts.
        explained: The judge's answers.
        exclusive: Which latents are exclusive with evidence.
    """
    done = {i: one for i in order if (one := results[i]) is not None}
    of_ways = [
        benjamini_hochberg(torch.tensor([getattr(one, p) for one in done.values()])).tolist()
        for p in ("p_ablated", "p_patched")
    ]
    q: dict[int, tuple[float, float]] = dict(zip(done, zip(*of_ways, strict=True), strict=True))
    ways: dict[int, tuple[bool, bool]] = {}
    for latent, one in done.items():
        ablated, patched = (effect.mean >= MIN_EFFECT for effect in one.effects[:2])
        ways[latent] = (
            ablated and one.beyond_ablated and q[latent][0] <= Q,
            patched and one.beyond_patched and q[latent][1] <= Q,
        )

    def verdict(latent: int) -> str:
        if latent not in ways:
            return UNTESTED
        return {2: CONFIRMED, 1: PARTIAL, 0: NOT_CONFIRMED}[sum(ways[latent])]

    def effect(latent: int) -> float:
        one = results[latent]
        return 0.0 if one is None else sum(e.mean for e in one.effects[:2])

    def finding(latent: int, rank: int) -> Finding:
        one, said = results[latent], explained.get(latent, Explained())
        return Finding(
            latent=latent,
            partition=crosscoder.partition.name_of(latent),
            rank=rank,
            description=said.description,
            detection=said.detection,
            concerns=list(said.concerns),
            effects=[] if one is None else one.effects,
            samples=[] if one is None else one.samples,
            verdict=verdict(latent),
            reasons=_reasons(one, q.get(latent), bool(exclusive[latent])),
        )

    ranked = sorted(order, key=lambda i: (VERDICTS.index(verdict(i)), -effect(i)))
    return [finding(latent, rank) for rank, latent in enumerate(ranked, 1)]


def _reasons(
    one: CausalTest | None, q: tuple[float, float] | None, is_exclusive: bool
) -> list[str]:
    called = (
        "It is exclusive, with evidence from activations."
        if is_exclusive
        else "It is not significant (exclusive): its activation or direction was found in the other model too, or could not be ruled out there."
    )
    if one is None or q is None:
        return [
            called,
            f"It fires at the end of fewer than {MIN_TEXTS} of its test texts.",
        ]
    source, target = one.source.upper(), "B" if one.source == "a" else "A"
    shares = [
        e.mean / one.baseline_js_bits if one.baseline_js_bits > 0 else 0.0 for e in one.effects[:2]
    ]
    return [
        called,
        f"On {one.n_texts} test texts, not used for its description, the models' predictions are {one.baseline_js_bits:.3f} bits apart.",
        f"Ablating its model-specific part in {source} removes {shares[0]:.0%} of that (q = {q[0]:.2g}, "
        f"{'beyond' if one.beyond_ablated else 'within'} the controls); adding it to {target} removes {shares[1]:.0%} "
        f"(q = {q[1]:.2g}, {'beyond' if one.beyond_patched else 'within'} the controls).",
    ]


def verdict_stage(found: Sequence[Finding]) -> StageCount:
    """Count the verdicts; confirmed latents pass the stage."""
    counts = Counter(finding.verdict for finding in found)
    return stage(
        "confirmed by steering", len(found), {v: counts[v] for v in VERDICTS if v != CONFIRMED}
    )


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
    target: ModelName = "b" if own.source == "a" else "a"
    found: list[SteeringSample] = []
    ways: list[tuple[ModelName, str, Tensor]] = [
        (own.source, "model-specific part ablated", -own.own),
        (target, "model-specific part patched in", own.moved),
    ]
    for m, change, direction in ways:
        model = pair.a if m == "a" else pair.b
        for i in range(min(n, len(texts.rows.contexts))):
            found.append(_sample(model, m, change, texts, i, direction))
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
