"""Measures whether steering with a latent has the same effect in both models, by next-token
probabilities and without a judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.directions import (
    PROMPTS,
    Directions,
    by_group,
    check_directions,
    random_directions,
)
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.steering.generate import stop_ids
from sae_lens_dfc.analysis.steering.hooks import added, changed, logits
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.data.alignment.align import aligned_positions
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.stats.jackknife import mean_and_error


@dataclass(kw_only=True)
class BehaviorOptions:
    """Options for comparing the effect of steering with a latent between two models.

    Raises:
        ValueError: There is no prompt, a strength is not above 0, or a number is negative.
    """

    prompts: tuple[str, ...] = PROMPTS
    """Questions that the steered models answer."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0, 10.0)
    """Steering strengths, in multiples of a latent's maximum activation, added at every token."""
    n_continuation: int = 4
    """Tokens of the unsteered source model's answer that both models also read; 0 compares only the
    first answer token."""
    n_random: int = 8
    """Number of pairs of random control directions."""
    seed: int = 42
    """Seed of the random directions."""

    def __post_init__(self) -> None:
        if not self.prompts or not self.strengths:
            raise ValueError("Behavior needs at least one prompt and one strength. Give some.")
        if not all(0 < s < math.inf for s in self.strengths):
            raise ValueError(f"Each of strengths must be above 0, got {self.strengths}.")
        require(self, ("n_continuation", "n_random"), "at least 0")


class LatentBehavior(NamedTuple):
    """Effect of steering with one latent, averaged over prompts, positions and strengths."""

    score: float
    """Share of the probability increase in the source model that does not occur in the target; from
    0 to 1."""
    moved: float
    """Total variation distance between the steered and the unsteered source model, from 0 to 1."""
    divergence: float
    """Increase of the Jensen-Shannon divergence between the models under steering, in bits; from -1
    to 1."""
    effect_in_source: float
    """Jensen-Shannon divergence between the steered and the unsteered source model, in bits."""
    effect_in_target: float
    """The same for the target model."""
    other_mass: tuple[float, float]
    """Probability mass of steered A and B on tokens that only one vocabulary has; they count as one
    outcome."""


class BehaviorResult(NamedTuple):
    """Aggregate metrics, and the results of each latent."""

    metrics: dict[str, float]
    """Flat, see `behavior`."""
    latents: dict[int, LatentBehavior]
    """Results of each latent."""
    random: list[LatentBehavior]
    """Results of each pair of random directions."""


class Steered(NamedTuple):
    """One model's probabilities over the outcomes common to both models."""

    before: Float[Tensor, "strengths positions n_outcomes"]
    """Unsteered; the same at each strength."""
    after: Float[Tensor, "strengths positions n_outcomes"]
    """Steered at each strength."""


class PromptContext(NamedTuple):
    """A text that both models read, with the positions at which both have read the same part of an
    answer."""

    ids: dict[str, list[int]]
    """Each model's tokens."""
    positions: dict[str, list[int]]
    """Positions at which the models' next-token predictions are compared, in pairs."""


def behavior(
    pair: ModelPair,
    directions: Mapping[int, Directions],
    groups: Mapping[int, str],
    options: BehaviorOptions | None = None,
) -> BehaviorResult:
    """Steer both models with each latent, and measure the effect that occurs only in the source
    model.

    Follows the exclusivity score of arXiv 2602.11729 (section 3.2.2), with probabilities in place
    of a judge. Let `p_m(s)` be model m's next-token probabilities over the common outcomes (see
    `common_outcomes`) at strength s, and `g_m(s) = max(p_m(s) - p_m(0), 0)` the increase under
    steering. A latent's score is

        sum of max(g_source(s) - g_target(s), 0)  /  sum of g_source(s)

    with both sums over outcomes, prompts, positions and strengths. It is 0 when the target changes
    like the source, 1 when the target does not change or changes differently, and 0 (no evidence)
    when nothing changes in the source. The score depends only on changes, not on the unsteered
    predictions. A difference of divergences does depend on them: two models that never answer in
    the same words cannot diverge further.

    Two unrelated directions score about 1, so compare scores with `random`. A map between the
    models that transfers nothing makes every latent look exclusive; to check for this, give mapped
    random directions as a group of their own.

    Metric keys, each a mean over the latents of a group, with its standard error in `/se`:

    - `behavior/GROUP`: the score; `behavior/moved/GROUP`: mean over prompts, positions and
      strengths of `g_source(s)` summed over outcomes, which is the total variation distance between
      the steered and the unsteered source model;
    - `behavior/divergence/GROUP`: mean of `JS(p_a(s), p_b(s)) - JS(p_a(0), p_b(0))`, in bits;
    - `behavior/effect_in_source/GROUP`, `behavior/effect_in_target/GROUP`: mean of `JS(p_m(s),
      p_m(0))`, in bits;
    - the same for the group `random`: pairs of unrelated random directions with the norms of the
      latents' directions;
    - `behavior/other_mass/a`, `behavior/other_mass/b`: the steered models' probability mass on
      tokens that only one vocabulary has. They count as one outcome, so a large mass hides
      differences.

    Args:
        pair: The two models, with all their layers.
        directions: What each latent adds at strength 1.
        groups: Each latent's group, e.g. its partition's name.
        options: Prompts, strengths and number of controls.

    Raises:
        ValueError: There is no latent, one has no group, or a direction has another width than its
            model, is not finite, or is zero in its source model.
    """
    options = options or BehaviorOptions()
    check_directions(pair, directions, groups)
    outcomes = common_outcomes(pair.a, pair.b)
    control = random_directions(list(directions.values()), options.n_random, options.seed)
    contexts = {
        source: contexts_of(pair, source, outcomes, options)
        for source in pair.models
        if any(d.source == source for d in directions.values())
    }
    every = [*directions.values(), *control]
    values = [
        _latent_behavior(pair, d, contexts[d.source], outcomes, options.strengths)
        for d in tqdm(every, "Steering both models", unit=" latents", leave=False)
    ]
    latents = dict(zip(directions, values, strict=False))
    random = values[len(directions) :]
    return BehaviorResult(_metrics(latents, groups, random), latents, random)


def contexts_of(
    pair: ModelPair,
    source: ModelName,
    outcomes: tuple[Outcomes, Outcomes],
    options: BehaviorOptions,
) -> list[tuple[PromptContext, dict[str, Tensor]]]:
    """Each prompt with the start of the source model's greedy answer, and both models' unsteered
    probabilities.

    The positions are the prompt's last, and those in the answer at which both models have read the
    same text.
    """
    models = pair.models
    result: list[tuple[PromptContext, dict[str, Tensor]]] = []
    for prompt in options.prompts:
        asked = {name: prompt_ids(model, clean(prompt)) for name, model in models.items()}
        text = _greedy(models[source], asked[source], options.n_continuation)
        said = {name: tokenize(model.tokenizer, text) for name, model in models.items()}
        pairs = [(-1, -1), *aligned_positions(said["a"], said["b"])]
        context = PromptContext(
            {name: [*asked[name], *said[name].ids] for name in models},
            {name: [len(asked[name]) + p[i] for p in pairs] for i, name in enumerate(models)},
        )
        # Same batch size as when steered, so that strength 0 is bit-identical.
        n = len(options.strengths)
        before = {
            name: _probabilities(models[name], context, name, torch.zeros(n, model.d_model), own)
            for (name, model), own in zip(models.items(), outcomes, strict=True)
        }
        result.append((context, before))
    return result


def _greedy(model: HookedModel, ids: list[int], n: int) -> str:
    new: list[int] = []
    for _ in range(n):
        row = torch.tensor([[*ids, *new]])
        token = int(logits(model, row, torch.ones_like(row), positions=[-1])[0, 0].argmax())
        if token in stop_ids(model):
            break
        new.append(token)
    return clean(str(model.tokenizer.decode(new, clean_up_tokenization_spaces=False)))


def _probabilities(
    model: HookedModel,
    context: PromptContext,
    name: str,
    vectors: Float[Tensor, "strengths d_model"],
    outcomes: Outcomes,
) -> Float[Tensor, "strengths positions n_outcomes"]:
    ids = torch.tensor([context.ids[name]]).expand(len(vectors), -1)
    with changed(model, added(vectors)):
        found = logits(model, ids, torch.ones_like(ids), context.positions[name])
    return outcome_probabilities(found, outcomes)


def _latent_behavior(
    pair: ModelPair,
    directions: Directions,
    contexts: Sequence[tuple[PromptContext, dict[str, Tensor]]],
    outcomes: tuple[Outcomes, Outcomes],
    strengths: Sequence[float],
) -> LatentBehavior:
    multiples = torch.tensor(strengths)[:, None]
    found: list[dict[str, Tensor]] = []
    for context, before in contexts:
        steered: dict[str, Steered] = {}
        for name, model, vector, own in (
            ("a", pair.a, directions.a, outcomes[0]),
            ("b", pair.b, directions.b, outcomes[1]),
        ):
            vectors = multiples * vector.detach().float().cpu()
            after = _probabilities(model, context, name, vectors, own)
            steered[name] = Steered(*(x.to(pair.a.device) for x in (before[name], after)))
        source = directions.source
        measures = compare_effects(steered[source], steered[OTHER[source]])
        other = {f"other_{name}": steered[name].after[..., -1].mean(dim=-1) for name in steered}
        found.append({**measures, **other})
    mean = {k: torch.stack([f[k] for f in found]).mean(dim=0).mean().item() for k in found[0]}
    return LatentBehavior(
        # 0 if nothing changes; NaN from overflowed logits is kept.
        score=0.0 if mean["moved"] == 0 else mean["unshared"] / mean["moved"],
        moved=mean["moved"],
        divergence=mean["divergence"],
        effect_in_source=mean["effect_in_source"],
        effect_in_target=mean["effect_in_target"],
        other_mass=(mean["other_a"], mean["other_b"]),
    )


def compare_effects(source: Steered, target: Steered) -> dict[str, Float[Tensor, " strengths"]]:
    """Effects of steering on the source and the target model at each strength, averaged over
    positions.

    Here steering raises the first outcome's probability by a half in the source and a quarter in
    the target:

    >>> before, half, quarter = (torch.tensor([[x]]) for x in ([0.0, 1.0], [0.5, 0.5], [0.25, 0.75]))
    >>> found = compare_effects(Steered(before, half), Steered(before, quarter))
    >>> found["unshared"], found["moved"]
    (tensor([0.2500]), tensor([0.5000]))
    """
    brought = [(model.after - model.before).clamp(min=0) for model in (source, target)]
    apart = jensen_shannon(source.after, target.after) - jensen_shannon(
        source.before, target.before
    )
    found = {
        "unshared": (brought[0] - brought[1]).clamp(min=0).sum(dim=-1),
        "moved": brought[0].sum(dim=-1),
        "divergence": apart,
        "effect_in_source": jensen_shannon(source.after, source.before),
        "effect_in_target": jensen_shannon(target.after, target.before),
    }
    return {name: value.mean(dim=-1) for name, value in found.items()}


def _metrics(
    latents: Mapping[int, LatentBehavior],
    groups: Mapping[int, str],
    random: Sequence[LatentBehavior],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for group, found in by_group(latents, groups, random).items():
        metrics |= mean_and_error(f"behavior/{group}", [f.score for f in found])
        for name in ("moved", "divergence", "effect_in_source", "effect_in_target"):
            of_name = [getattr(f, name) for f in found]
            metrics |= mean_and_error(f"behavior/{name}/{group}", of_name)
    for i, name in enumerate(("a", "b")):
        masses = [f.other_mass[i] for f in latents.values()]
        metrics[f"behavior/other_mass/{name}"] = sum(masses) / len(masses)
    return metrics
