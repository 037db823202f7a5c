"""Turns the causal tests of a screening into a verdict on each latent."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sae_lens_dfc.analysis.causal.activation_patching import (
    ModelSpecificDirection,
    Verification,
)
from sae_lens_dfc.analysis.options import MIN_TEXTS
from sae_lens_dfc.analysis.report.findings import EffectView, Finding, StageCount, SteeringSample
from sae_lens_dfc.analysis.screening.candidates import stage
from sae_lens_dfc.analysis.screening.shared_verdicts import NOTHING_SHOWN, UNTESTED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.evidence import MAX_KNOWN, LatentEvidence
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.significance import Effect, benjamini_hochberg, interval

Q = 0.05
"""False discovery rate among the verdicts."""
MIN_EFFECT = 0.01
"""Minimum effect in bits: where the models agree, 0.001 bits can be significant but is
negligible."""
CONFIRMED, PARTIAL, NOT_CONFIRMED = "confirmed", "partial", "not confirmed"
OF_ONE_BASIS = (CONFIRMED, PARTIAL, NOT_CONFIRMED, UNTESTED)
"""Verdicts between models of one basis, from strongest to weakest."""
EXCLUSIVE_USED, EXCLUSIVE_UNUSED, EXCLUSIVE_UNTESTED = (
    "exclusive and used",
    "exclusive, no effect found",
    "exclusive, not tested",
)
SHARED_BY_BOTH, NOT_JUDGED = "shared", "not judged"
OF_TWO_BASES = (
    *(EXCLUSIVE_USED, EXCLUSIVE_UNUSED, EXCLUSIVE_UNTESTED),
    *(SHARED_BY_BOTH, NOTHING_SHOWN, NOT_JUDGED),
)
"""Verdicts between other models, from strongest to weakest."""


@dataclass(frozen=True)
class Way:
    """One effect of a causal test beside its controls."""

    shown: EffectView
    p: float
    is_beyond: bool
    """Whether it is beyond the 95th percentile of every kind of control."""


@dataclass(frozen=True)
class CausalTest:
    """Result of one latent's causal test."""

    source: ModelName
    """The model in which the model-specific direction was ablated."""
    n_texts: int
    baseline_js_bits: float
    """Jensen-Shannon divergence between the models without intervention, in bits."""
    ablated: Way
    """How much closer ablating in the source brings the models."""
    patched: Way
    """How much closer adding to the other model brings them."""
    used: Way
    """How far ablating in the source moves the source's own predictions."""
    off_topic: EffectView | None
    """Of adding to the other model where the latent is silent; none if it is silent too rarely."""
    samples: list[SteeringSample]


def tested(
    own: ModelSpecificDirection,
    found: Verification,
    off_topic: Verification | None,
    samples: list[SteeringSample],
) -> CausalTest:
    """Convert a verification to the form shown in the report."""
    source, target = own.source.upper(), OTHER[own.source].upper()
    silent = f"added to {target} where it is silent: closer by, bits"
    return CausalTest(
        source=own.source,
        n_texts=len(found.ablated.values),
        baseline_js_bits=found.baseline_js_bits,
        ablated=_way(f"ablated in {source}: closer by, bits", found.ablated),
        patched=_way(f"added to {target}: closer by, bits", found.patched),
        used=_way(f"ablated in {source}: {source} moves by, bits", found.used),
        off_topic=None if off_topic is None else _view(silent, off_topic.patched),
        samples=samples,
    )


def _way(name: str, effect: Effect) -> Way:
    return Way(_view(name, effect), effect.p, effect.is_beyond)


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
    evidence: LatentEvidence,
    one_basis: bool,
) -> list[Finding]:
    """A verdict on each latent; `ranked` orders them.

    An effect *holds* if it is 0.01 bits or more, beyond the 95th percentile of every kind of
    control, and significant at a false discovery rate of 5 % over all tested latents
    (Benjamini-Hochberg on the p-values of each kind of effect).

    If both models share one basis, a latent is `confirmed` when ablating its model-specific
    direction in the source and adding it to the other model both bring the models closer, and
    `partial` when only one of them does. Between other models, where adding a direction needs a map
    that may lack what one model alone has, it is

    - `exclusive and used` if it is exclusive with evidence and ablating it moves its own model's
      predictions;
    - `exclusive, no effect found` if it is exclusive with evidence only, and `exclusive, not tested`
      if it fires at the end of too few test texts;
    - `shared` if the other model knows half of it or more;
    - `nothing shown` if it is judged and none of these holds, and `not judged` otherwise.

    Args:
        crosscoder: The saved crosscoder.
        order: The tested latents, ordered by evidence.
        results: Result of each test; none if the latent fired at the end of too few texts.
        explained: The judge's answers.
        evidence: Evidence of exclusivity.
        one_basis: Whether both models share one basis, as a model and its fine-tune do.
    """
    done = {i: one for i in order if (one := results[i]) is not None}
    q = {name: _adjusted(done, name) for name in ("ablated", "patched", "used")}

    def holds(latent: int, name: str) -> bool:
        way: Way = getattr(done[latent], name)
        return way.shown.mean >= MIN_EFFECT and way.is_beyond and q[name][latent] <= Q

    def verdict(latent: int) -> str:
        if not one_basis:
            return _of_two_bases(
                evidence, latent, holds(latent, "used") if latent in done else None
            )
        if latent not in done:
            return UNTESTED
        ways = holds(latent, "ablated") + holds(latent, "patched")
        return {2: CONFIRMED, 1: PARTIAL, 0: NOT_CONFIRMED}[ways]

    def finding(latent: int) -> Finding:
        one, said = done.get(latent), explained.get(latent, Explained())
        called = EXCLUSIVE if evidence.is_exclusive[latent] else NOT_EXCLUSIVE
        of_test = [TOO_FEW_TEXTS]
        if one is not None:
            adjusted = {name: values[latent] for name, values in q.items()}
            of_test = _reasons(one, adjusted, one_basis)
        return Finding(
            latent=latent,
            partition=crosscoder.partition.name_of(latent),
            rank=0,
            description=said.description,
            detection=said.detection,
            concerns=list(said.concerns),
            effects=[] if one is None else _effects(one, one_basis),
            samples=[] if one is None else one.samples,
            verdict=verdict(latent),
            reasons=[called, *of_test],
        )

    return [finding(latent) for latent in order]


def ranked(found: Iterable[Finding], verdicts: Sequence[str]) -> list[Finding]:
    """Order findings by strength of the verdict, then by size of the effect, and number them.

    Args:
        found: The findings.
        verdicts: Their verdicts, from strongest to weakest.
    """

    def size(one: Finding) -> float:
        return sum(effect.mean for effect in one.effects[: 2 if verdicts == OF_ONE_BASIS else 1])

    order = sorted(found, key=lambda one: (verdicts.index(one.verdict), -size(one)))
    return [replace(one, rank=rank) for rank, one in enumerate(order, 1)]


def _adjusted(done: Mapping[int, CausalTest], name: str) -> dict[int, float]:
    p = torch.tensor([getattr(one, name).p for one in done.values()])
    return dict(zip(done, benjamini_hochberg(p).tolist(), strict=True))


def _of_two_bases(evidence: LatentEvidence, latent: int, is_used: bool | None) -> str:
    """The verdict between models of two bases; `is_used` is none for a latent without a test."""
    if evidence.is_exclusive[latent]:
        return {None: EXCLUSIVE_UNTESTED, True: EXCLUSIVE_USED, False: EXCLUSIVE_UNUSED}[is_used]
    if not evidence.is_judged[latent]:
        return NOT_JUDGED
    if evidence.known[latent] >= MAX_KNOWN:
        return SHARED_BY_BOTH
    return NOTHING_SHOWN


def _effects(one: CausalTest, one_basis: bool) -> list[EffectView]:
    """All effects, those of the verdict first."""
    closer, used = [one.ablated.shown, one.patched.shown], [one.used.shown]
    off_topic = [] if one.off_topic is None else [one.off_topic]
    return [*closer, *used, *off_topic] if one_basis else [*used, *closer, *off_topic]


def effect_names(one_basis: bool) -> tuple[str, str]:
    """Short names of the first two effects of a finding."""
    ablated = "ablated: closer by, bits"
    return (ablated, "patched in") if one_basis else ("ablated: moves by, bits", ablated)


EXCLUSIVE = "It is exclusive, with evidence from activations."
NOT_EXCLUSIVE = "It is not shown to be exclusive: its activation was found in the other model too, or could not be ruled out there."
TOO_FEW_TEXTS = f"It fires at the end of fewer than {MIN_TEXTS} of its test texts."


def _reasons(one: CausalTest, q: Mapping[str, float], one_basis: bool) -> list[str]:
    source, target = one.source.upper(), OTHER[one.source].upper()

    def beside(name: str) -> str:
        way: Way = getattr(one, name)
        return f"(q = {q[name]:.2g}, {'beyond' if way.is_beyond else 'within'} the controls)"

    def share(way: Way) -> str:
        whole = one.baseline_js_bits
        return f"{way.shown.mean / whole if whole > 0 else 0.0:.0%}"

    used = f"Ablating it in {source} moves {source}'s own predictions by {one.used.shown.mean:.3f} bits {beside('used')}."
    apart = f"On {one.n_texts} test texts, not used for its description, the models' predictions are {one.baseline_js_bits:.3f} bits apart."
    closer = (
        f"Ablating its model-specific part in {source} removes {share(one.ablated)} of that {beside('ablated')}; "
        f"adding it to {target} removes {share(one.patched)} {beside('patched')}."
    )
    return [apart, closer, used] if one_basis else [used, apart, closer]


def verdict_stage(found: Sequence[Finding]) -> StageCount:
    """Count the verdicts; confirmed latents, and those exclusive and used, pass the stage."""
    counts = Counter(finding.verdict for finding in found)
    passed = CONFIRMED, EXCLUSIVE_USED
    others = [v for v in (*OF_ONE_BASIS, *OF_TWO_BASES) if v not in passed]
    return stage("confirmed by steering", len(found), {v: counts[v] for v in others})
