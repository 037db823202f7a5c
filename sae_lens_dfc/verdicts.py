"""What the causal tests of a screening come to: a verdict on each latent, and the texts that show it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.files import from_plain
from sae_lens_dfc.findings import EffectView, Finding, StageCount, SteeringSample
from sae_lens_dfc.generate import Sampling, answer
from sae_lens_dfc.metrics.effects import Effect, interval
from sae_lens_dfc.metrics.significance import benjamini_hochberg
from sae_lens_dfc.metrics.verification import MIN_TEXTS, Own, Source, Texts, Verification
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.positions import positions_of
from sae_lens_dfc.screening import stage
from sae_lens_dfc.steering import changed

Q = 0.05
"""False discovery rate among the verdicts."""
MIN_EFFECT = 0.01
"""Bits by which the models must come closer: where they say the same, a thousandth of one can be significant and means nothing."""
CONFIRMED, ONE_WAY, NOT_CONFIRMED, UNTESTED = (
    "confirmed",
    "one way only",
    "not confirmed",
    "not tested",
)
VERDICTS = (CONFIRMED, ONE_WAY, NOT_CONFIRMED, UNTESTED)
"""From the most to the least that can be said."""


@dataclass(frozen=True)
class CausalTest:
    """What the causal test of one latent found."""

    source: Source
    """The model whose own part was taken."""
    n_texts: int
    apart: float
    """Bits of Jensen-Shannon divergence between the models, where nothing is changed."""
    effects: list[EffectView]
    p_taken: float
    p_given: float
    beyond_taken: bool
    beyond_given: bool
    samples: list[SteeringSample]

    @classmethod
    def from_dict(cls, values: Any) -> "CausalTest":
        """From what `dataclasses.asdict` gave.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(values, Mapping) or not all(
            isinstance(values.get(name), list) for name in ("effects", "samples")
        ):
            raise ValueError(
                f"A causal test must have lists of effects and samples, got {values!r:.80}."
            )
        parts: dict[str, Any] = {
            "effects": [from_plain(EffectView, one, "An effect") for one in values["effects"]],
            "samples": [from_plain(SteeringSample, one, "A sample") for one in values["samples"]],
        }
        return from_plain(cls, {**values, **parts}, "A causal test")


def tested(
    own: Own, found: Verification, off_topic: Verification | None, samples: list[SteeringSample]
) -> CausalTest:
    """A verification as a report shows it, in shares of how far the models are apart there."""
    source, target = own.source.upper(), "B" if own.source == "a" else "A"
    effects = [
        _view(f"taken from {source}: closer by, bits", found.taken),
        _view(f"given to {target}: closer by, bits", found.given),
    ]
    if off_topic is not None:
        effects.append(_view(f"given to {target} where it is silent, bits", off_topic.given))
    return CausalTest(
        own.source,
        len(found.taken.values),
        found.apart,
        effects,
        found.taken.p,
        found.given.p,
        found.taken.is_beyond,
        found.given.is_beyond,
        samples,
    )


def _view(name: str, effect: Effect) -> EffectView:
    return EffectView(name, effect.mean, *interval(effect.values), effect.limits)


class Explained(NamedTuple):
    """What a judge said of a latent; nothing where none was asked."""

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
    """A verdict on each latent, the most that can be said first, and the larger effect before the smaller.

    A latent is `confirmed` when taking its own part from the model that has it and giving it to the other both bring the two
    models closer by 0.01 bits or more, each beyond the 95th percentile of every kind of control and at a false discovery rate of 5 % over all
    that were tested (Benjamini-Hochberg on each way's p-values); `one way only` when one of them does.

    Args:
        crosscoder: The saved crosscoder.
        order: The latents tested, the most evidence first.
        results: What each test found; none where the latent fired at the end of too few texts.
        explained: What a judge said.
        exclusive: Which latents are called exclusive with evidence.
    """
    done = {i: one for i in order if (one := results[i]) is not None}
    of_ways = [
        benjamini_hochberg(torch.tensor([getattr(one, p) for one in done.values()])).tolist()
        for p in ("p_taken", "p_given")
    ]
    q: dict[int, tuple[float, float]] = dict(zip(done, zip(*of_ways, strict=True), strict=True))
    ways: dict[int, tuple[bool, bool]] = {}
    for latent, one in done.items():
        taken, given = (effect.mean >= MIN_EFFECT for effect in one.effects[:2])
        ways[latent] = (
            taken and one.beyond_taken and q[latent][0] <= Q,
            given and one.beyond_given and q[latent][1] <= Q,
        )

    def verdict(latent: int) -> str:
        if latent not in ways:
            return UNTESTED
        return {2: CONFIRMED, 1: ONE_WAY, 0: NOT_CONFIRMED}[sum(ways[latent])]

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
        "It is called exclusive, with evidence."
        if is_exclusive
        else "It is not called exclusive: its activation or direction is found in the other model too, or was not shown not to be."
    )
    if one is None or q is None:
        return [
            called,
            f"It fires at the end of fewer than {MIN_TEXTS} of the texts kept for the test.",
        ]
    source, target = one.source.upper(), "B" if one.source == "a" else "A"
    shares = [e.mean / one.apart if one.apart > 0 else 0.0 for e in one.effects[:2]]
    return [
        called,
        f"On {one.n_texts} texts by which it was not described, the models' predictions are {one.apart:.3f} bits apart.",
        f"Taking its own part from {source} removes {shares[0]:.0%} of that (q = {q[0]:.2g}, "
        f"{'beyond' if one.beyond_taken else 'within'} the controls); giving it to {target} removes {shares[1]:.0%} "
        f"(q = {q[1]:.2g}, {'beyond' if one.beyond_given else 'within'} the controls).",
    ]


def verdict_stage(found: Sequence[Finding]) -> StageCount:
    """How many came to which verdict; those confirmed go on."""
    counts = Counter(finding.verdict for finding in found)
    return stage(
        "confirmed by steering", len(found), {v: counts[v] for v in VERDICTS if v != CONFIRMED}
    )


SAMPLED = Sampling(max_new_tokens=24, temperature=0.0)


@torch.no_grad()
def samples(pair: ModelPair, texts: Texts, own: Own, n: int = 2) -> list[SteeringSample]:
    """How both models go on from the first texts, untouched and with the latent's own part taken or given.

    The change is made at the text's own positions, where its activation is known; what the model writes after is its own.
    """
    target: Source = "b" if own.source == "a" else "a"
    found: list[SteeringSample] = []
    ways: list[tuple[Source, str, Tensor]] = [
        (own.source, "own part taken", -own.own),
        (target, "own part given", own.moved),
    ]
    for m, change, direction in ways:
        model = pair.a if m == "a" else pair.b
        for i in range(min(n, len(texts.rows.contexts))):
            found.append(_sample(model, m, change, texts, i, direction))
    return found


def _sample(
    model: HookedModel, m: Source, change: str, texts: Texts, i: int, direction: Tensor
) -> SteeringSample:
    reading = texts.readings[m]
    ids = reading.ids[i][reading.mask[i].bool()].tolist()
    here = reading.context == i
    edit = torch.zeros(len(ids), len(direction))
    edit[reading.position[here]] = texts.feature_acts[here, None] * direction.float().cpu()

    def written(acts: Tensor) -> Tensor:
        # Without a key-value cache the passes grow by what was generated.
        return acts + pad(edit, (0, 0, 0, acts.shape[1] - len(ids))).to(acts)

    [before] = answer(model, [ids], SAMPLED, seed=0)
    with changed(model, written, positions_of("prompt", [ids])):
        [after] = answer(model, [ids], SAMPLED, seed=0)
    prompt = model.tokenizer.decode(ids, skip_special_tokens=False)
    return SteeringSample(m, change, 1.0, str(prompt), before, after)
