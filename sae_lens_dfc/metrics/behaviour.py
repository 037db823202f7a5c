"""Whether steering with a latent does the same to both models: their next-token probabilities, without a judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.alignment import aligned_positions
from sae_lens_dfc.generate import stop_ids
from sae_lens_dfc.metrics.directions import (
    PROMPTS,
    Directions,
    by_group,
    check_directions,
    random_directions,
)
from sae_lens_dfc.metrics.outcomes import (
    Outcomes,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.metrics.spread import mean_and_error
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.prompts import prompt_ids
from sae_lens_dfc.steering import added, changed, logits
from sae_lens_dfc.texts import clean
from sae_lens_dfc.tokens import tokenize


@dataclass(kw_only=True)
class BehaviourOptions:
    """How steering with a latent is compared between two models.

    Raises:
        ValueError: There is no prompt, a strength is not above 0, or a number is negative.
    """

    prompts: tuple[str, ...] = PROMPTS
    """Questions that the steered models answer."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0, 10.0)
    """Multiples of a latent's largest activation that are added at every token."""
    n_continuation: int = 4
    """Tokens of the unsteered source model's answer that both models read too; 0 looks at the first answer token alone."""
    n_random: int = 8
    """Number of pairs of random directions, the control."""
    seed: int = 42
    """Seed of the random directions."""

    def __post_init__(self) -> None:
        if not self.prompts or not self.strengths:
            raise ValueError("Behaviour needs at least one prompt and one strength. Give some.")
        if not all(0 < s < math.inf for s in self.strengths):
            raise ValueError(f"Each of strengths must be above 0, got {self.strengths}.")
        for name in ("n_continuation", "n_random"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}.")


class LatentBehaviour(NamedTuple):
    """What steering with one latent does, on average over prompts, positions and strengths."""

    score: float
    """Share of what steering brings to the source model that it does not bring to the target; from 0 to 1."""
    moved: float
    """Probability that steering brings to any outcome in the source model: the total variation distance, from 0 to 1."""
    divergence: float
    """How much further apart the models are when steered, in bits of Jensen-Shannon divergence; from -1 to 1."""
    effect_in_source: float
    """Jensen-Shannon divergence of the source model steered and unsteered, in bits."""
    effect_in_target: float
    """The same of the target model."""
    other_mass: tuple[float, float]
    """Steered A's and B's probability of tokens that only one vocabulary has, which count as one outcome."""
    score_by_strength: list[float]
    """The score at each strength alone."""


class BehaviourResult(NamedTuple):
    """The measures of all latents, and of each."""

    metrics: dict[str, float]
    """Flat, see `behaviour`."""
    latents: dict[int, LatentBehaviour]
    """Of each latent."""
    random: list[LatentBehaviour]
    """Of each pair of random directions."""


class Steered(NamedTuple):
    """One model's probabilities of the outcomes common to two models."""

    before: Float[Tensor, "strengths positions n_outcomes"]
    """Unsteered; the same at each strength."""
    after: Float[Tensor, "strengths positions n_outcomes"]
    """Steered at each strength."""


class Context(NamedTuple):
    """A text that both models read, and where both have read the same of an answer."""

    ids: dict[str, list[int]]
    """Each model's tokens."""
    positions: dict[str, list[int]]
    """Positions after which the models' next tokens are compared, pair by pair."""


def behaviour(
    pair: ModelPair,
    directions: Mapping[int, Directions],
    groups: Mapping[int, str],
    options: BehaviourOptions | None = None,
) -> BehaviourResult:
    """Steer both models with each latent, and see what steering brings to the source model alone.

    In the design of the exclusivity score of arXiv 2602.11729 (section 3.2.2), with probabilities in place of a judge.
    With `p_m(s)` model m's next-token probabilities over the outcomes common to both (see `common_outcomes`) at
    strength s, what steering brings is `g_m(s) = max(p_m(s) - p_m(0), 0)`, and a latent's score is

        sum of max(g_source(s) - g_target(s), 0)  /  sum of g_source(s)

    with both sums over outcomes, prompts, positions and strengths. It is 0 when the target follows the source, 1 when the
    target does nothing or something else, and 0, since it is no evidence, when nothing moves in the source. It counts
    changes, so what the models say unsteered does not matter; to a difference of divergences it does, since two models
    that never answer in the same words cannot diverge further.

    Two unrelated directions give about 1: read a score beside `random`. A map between the models that carries
    nothing over makes every latent look exclusive; to see that, give mapped random directions as a group of their own.

    Keys of the metrics, each a mean over the latents of a group, with `/se` the standard error over them:

    - `behaviour/GROUP`: the score; `behaviour/moved/GROUP`: mean over prompts, positions and strengths of `g_source(s)`
      summed over outcomes, the total variation distance of the source model steered and unsteered;
    - `behaviour/divergence/GROUP`: mean of `JS(p_a(s), p_b(s)) - JS(p_a(0), p_b(0))`, in bits;
    - `behaviour/effect_in_source/GROUP`, `behaviour/effect_in_target/GROUP`: mean of `JS(p_m(s), p_m(0))`, in bits;
    - the same of the group `random`: pairs of unrelated random directions as long as the latents' own;
    - `behaviour/other_mass/a`, `behaviour/other_mass/b`: the steered models' probability of tokens that only one
      vocabulary has; they count as one outcome, so a large share of them hides differences.

    Args:
        pair: The two models, with all their layers.
        directions: What each latent adds at strength 1.
        groups: Each latent's group, e.g. its partition's name.
        options: Prompts, strengths and the control.

    Raises:
        ValueError: There is no latent, one has no group, or a direction has another width than its model, is not
            finite, or is zero in its source model.
    """
    options = options or BehaviourOptions()
    check_directions(pair, directions, groups)
    outcomes = common_outcomes(pair.a, pair.b)
    control = random_directions(list(directions.values()), options.n_random, options.seed)
    contexts = {
        source: contexts_of(pair, source, outcomes, options)
        for source in sorted({d.source for d in directions.values()})
    }
    every = [*directions.values(), *control]
    values = [
        _latent_behaviour(pair, d, contexts[d.source], outcomes, options.strengths)
        for d in tqdm(every, "Steering both models", unit=" latents", leave=False)
    ]
    latents = dict(zip(directions, values, strict=False))
    random = values[len(directions) :]
    return BehaviourResult(_metrics(latents, groups, random), latents, random)


def contexts_of(
    pair: ModelPair,
    source: str,
    outcomes: tuple[Outcomes, Outcomes],
    options: BehaviourOptions,
) -> list[tuple[Context, dict[str, Tensor]]]:
    """Each prompt with the first words of the source model's likeliest answer, and both models' unsteered probabilities.

    The positions are the prompt's last, and those of the answer at which both have read the same of it.
    """
    models = {"a": pair.a, "b": pair.b}
    result: list[tuple[Context, dict[str, Tensor]]] = []
    for prompt in options.prompts:
        asked = {name: prompt_ids(model, clean(prompt)) for name, model in models.items()}
        text = _greedy(models[source], asked[source], options.n_continuation)
        said = {name: tokenize(model.tokenizer, text) for name, model in models.items()}
        pairs = [(-1, -1), *aligned_positions(said["a"], said["b"])]
        context = Context(
            {name: [*asked[name], *said[name].ids] for name in models},
            {name: [len(asked[name]) + p[i] for p in pairs] for i, name in enumerate(models)},
        )
        # As many rows as when steered, so that strength 0 is the same to the last bit.
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
    context: Context,
    name: str,
    vectors: Float[Tensor, "strengths d_model"],
    outcomes: Outcomes,
) -> Float[Tensor, "strengths positions n_outcomes"]:
    ids = torch.tensor([context.ids[name]]).expand(len(vectors), -1)
    with changed(model, added(vectors)):
        found = logits(model, ids, torch.ones_like(ids), context.positions[name])
    return outcome_probabilities(found, outcomes)


def _latent_behaviour(
    pair: ModelPair,
    directions: Directions,
    contexts: Sequence[tuple[Context, dict[str, Tensor]]],
    outcomes: tuple[Outcomes, Outcomes],
    strengths: Sequence[float],
) -> LatentBehaviour:
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
        measures = compare(steered[source], steered["b" if source == "a" else "a"])
        other = {f"other_{name}": steered[name].after[..., -1].mean(dim=-1) for name in steered}
        found.append({**measures, **other})
    by_strength = {k: torch.stack([f[k] for f in found]).mean(dim=0) for k in found[0]}
    mean = {name: value.mean().item() for name, value in by_strength.items()}
    return LatentBehaviour(
        score=_share(mean["unshared"], mean["moved"]),
        moved=mean["moved"],
        divergence=mean["divergence"],
        effect_in_source=mean["effect_in_source"],
        effect_in_target=mean["effect_in_target"],
        other_mass=(mean["other_a"], mean["other_b"]),
        score_by_strength=[
            _share(unshared, moved)
            for unshared, moved in zip(
                by_strength["unshared"].tolist(), by_strength["moved"].tolist(), strict=True
            )
        ],
    )


def _share(unshared: float, moved: float) -> float:
    """0 where nothing moves; NaN, of logits that overflowed, stays."""
    return 0.0 if moved == 0 else unshared / moved


def compare(source: Steered, target: Steered) -> dict[str, Float[Tensor, " strengths"]]:
    """What steering does to the source model and to the target, at each strength; means over positions.

    Here steering brings half of the probability to the first outcome in the source, a quarter in the target:

    >>> before, half, quarter = (torch.tensor([[x]]) for x in ([0.0, 1.0], [0.5, 0.5], [0.25, 0.75]))
    >>> found = compare(Steered(before, half), Steered(before, quarter))
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
    latents: Mapping[int, LatentBehaviour],
    groups: Mapping[int, str],
    random: Sequence[LatentBehaviour],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for group, found in by_group(latents, groups, random).items():
        metrics |= mean_and_error(f"behaviour/{group}", [f.score for f in found])
        for name in ("moved", "divergence", "effect_in_source", "effect_in_target"):
            of_name = [getattr(f, name) for f in found]
            metrics |= mean_and_error(f"behaviour/{name}/{group}", of_name)
    for i, name in enumerate(("a", "b")):
        masses = [f.other_mass[i] for f in latents.values()]
        metrics[f"behaviour/other_mass/{name}"] = sum(masses) / len(masses)
    return metrics
