"""The causal test of a difference: without what a latent writes in one model alone, are the two models more alike?"""

from collections.abc import Mapping, Sequence, Set
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.activations import PairedRows, paired_activations
from sae_lens_dfc.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.latent_acts import latent_acts
from sae_lens_dfc.metrics.effects import Effect
from sae_lens_dfc.metrics.outcomes import (
    Outcomes,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.metrics.splicing import Reading, reading_of
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.steering import logits_at_end

Source = Literal["a", "b"]
MIN_TEXTS = 3


class Own(NamedTuple):
    """What one model writes for a latent beyond what the other does, per unit of activation."""

    latent: int
    source: Source
    """The model that writes more."""
    own: Float[Tensor, " d_source"]
    """Its decoder less the other's, moved to it: all of it for an exclusive latent."""
    moved: Float[Tensor, " d_target"]
    """The same in the other model."""


def own_part(
    of_a: Float[Tensor, "d_sae d_a"], of_b: Float[Tensor, "d_sae d_b"], latent: int, source: Source
) -> Own:
    """One latent of what `both_decoder_differences` gives. What B lacks is what would have to be added to it: the negative of its own."""
    both = {"a": of_a[latent], "b": of_b[latent]}
    other = "b" if source == "a" else "a"
    return Own(latent, source, both[source], -both[other])


class Texts(NamedTuple):
    """Texts that end where a latent fires, as both models read them."""

    rows: PairedRows
    feature_acts: Float[Tensor, " n"]
    """The latent's activation at each row."""
    readings: Mapping[Source, Reading]
    acts: Mapping[Source, Tensor]
    """Each model's activations at its hook."""

    @property
    def at_end(self) -> Float[Tensor, " texts"]:
        """The latent's activation at the end of each text."""
        return self.feature_acts[self._ends]

    def with_activation(self, value: float) -> "Texts":
        """The same texts, as if the latent were active at their ends alone, by so much."""
        return self._replace(feature_acts=self._ends * torch.tensor(value))

    @property
    def _ends(self) -> Bool[Tensor, " n"]:
        last = {c.number: len(c.segments) - 1 for c in self.rows.contexts}
        ends = torch.tensor([last[c] for c in self.rows.context.tolist()], dtype=torch.long)
        return self.rows.segment == ends


@torch.no_grad()
def texts_of(
    crosscoder: Crosscoder,
    pair: ModelPair,
    latent: int,
    windows: Sequence[Segments],
    fires: bool = True,
) -> Texts:
    """Read the windows, and keep those at whose end the latent fires, or does not; there may be none.

    Those in which a model has an activation that is NaN or infinite are left out: all that it says after is no number.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole.
        latent: The latent.
        windows: Texts, each after the pair's beginning-of-sequence segment.
        fires: Whether to keep those at whose end it fires, or those at whose end it does not.
    """
    contexts = [Context(window, i, i) for i, window in enumerate(windows)]
    batch = ContextBatch(contexts, {})
    # What it fires on may be an outlier, and few texts say nothing of a median.
    rows = next(iter(paired_activations(pair, [batch], PairCounts(), outlier_factor=float("inf"))))
    feature_acts = latent_acts(crosscoder, rows.acts, [latent])[:, 0].float().cpu()
    ends = torch.tensor([len(window) - 1 for window in windows])
    at_end = rows.segment == ends[rows.context]
    ended = set(rows.context[at_end & ((feature_acts > 0) == fires)].tolist())
    texts = _texts(pair, rows._replace(contexts=contexts), feature_acts, ended)
    broken = {
        context.number
        for i, context in enumerate(texts.rows.contexts)
        if not all(acts[i].isfinite().all() for acts in texts.acts.values())
    }
    return _texts(pair, texts.rows, texts.feature_acts, ended - broken) if broken else texts


def _texts(pair: ModelPair, rows: PairedRows, feature_acts: Tensor, numbers: Set[int]) -> Texts:
    """The contexts of these numbers among the rows', as both models read them."""
    here = torch.tensor([c in numbers for c in rows.context.tolist()], dtype=torch.bool)
    kept = tuple(c for c in rows.contexts if c.number in numbers)
    on = here.to(rows.acts.device)
    rows = PairedRows(rows.acts[on], rows.context[here], rows.segment[here], kept)
    readings: dict[Source, Reading] = {}
    acts: dict[Source, Tensor] = {}
    if kept:
        for m, model in _models(pair).items():
            readings[m] = reading_of(model, m, rows)
            acts[m] = model.activations(readings[m].ids, readings[m].mask).float()
    return Texts(rows, feature_acts[here], readings, acts)


class Verification(NamedTuple):
    """By how much closer the two models' next-token probabilities get, in bits of Jensen-Shannon divergence."""

    apart: float
    """How far apart they are where nothing is changed, from 0 to 1; the most that an effect can be."""
    taken: Effect
    """When the latent's own part is taken from the model that has it."""
    given: Effect
    """When it is added to the model that has it not."""


@torch.no_grad()
def verify(
    pair: ModelPair,
    texts: Texts,
    own: Own,
    controls: Mapping[str, Mapping[Source, Float[Tensor, "_ _"]]],
    outcomes: tuple[Outcomes, Outcomes] | None = None,
) -> Verification:
    """Whether the models are more alike without what a latent writes in one of them alone, and with it in both.

    With `f` the latent's activation, at every paired position: `x_s - f own` in the source, or `x_t + f moved` in the other
    model. What is compared are the probabilities of what both may say next, at the end of each text (`common_outcomes`), so
    that two tokenizers do: `JS(p_a, p_b)` untouched less that with one of them changed. It is positive when the change
    brings them together, and that both do is what a difference of the models, and no quirk of a direction, would do.

    Args:
        pair: The two models.
        texts: Texts at whose end it fires.
        own: What is the source's own.
        controls: By kind, directions for each model; they are made as long as what they stand beside.
        outcomes: What both may say; none finds out.

    Raises:
        ValueError: There are no texts, or a model's probabilities are NaN.
    """
    if not texts.rows.contexts:
        raise ValueError(f"Latent {own.latent} fires at the end of none of the texts. Give others.")
    of_models = dict(zip(("a", "b"), outcomes or common_outcomes(pair.a, pair.b), strict=True))
    models = _models(pair)
    target: Source = "b" if own.source == "a" else "a"

    def told(m: Source, direction: Tensor | None) -> Tensor:
        acts = texts.acts[m]
        if direction is not None:
            reading = texts.readings[m]
            acts = acts.clone()
            where = reading.context.to(acts.device), reading.position.to(acts.device)
            acts[where] += texts.feature_acts.to(acts)[:, None] * direction.to(acts)
        reading = texts.readings[m]
        found = logits_at_end(models[m], reading.ids, reading.mask, acts)
        probabilities = outcome_probabilities(found, of_models[m]).cpu()
        if probabilities.isnan().any():
            raise ValueError(
                f"Model {m.upper()}'s next-token probabilities are NaN{'' if direction is None else ' when it is changed'}: its "
                "activations overflow. Load it in bfloat16 or float32."
            )
        return probabilities

    untouched = {m: told(m, None) for m in models}
    apart = jensen_shannon(untouched["a"], untouched["b"])

    def effect(m: Source, direction: Tensor) -> Effect:
        other = untouched["b" if m == "a" else "a"]

        def closer(one: Tensor) -> Tensor:
            return apart - jensen_shannon(told(m, one), other)

        beside = {
            kind: torch.stack([closer(one) for one in _as_long(of_models[m], direction)])
            for kind, of_models in controls.items()
        }
        return Effect(closer(direction), beside)

    return Verification(
        apart.mean().item(), effect(own.source, -own.own), effect(target, own.moved)
    )


def _as_long(directions: Float[Tensor, "k d"], like: Float[Tensor, " d"]) -> Float[Tensor, "k d"]:
    return normalize(directions.float()) * like.float().norm()


def _models(pair: ModelPair) -> dict[Source, HookedModel]:
    return {"a": pair.a, "b": pair.b}


def drawn_directions(
    acts: Float[Tensor, "n d"], k: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Random directions with the covariance of a model's activations: of those that it does use.

    >>> rows = torch.tensor([[0.0, 5.0], [1.0, 5.0]])
    >>> drawn_directions(rows, 3, torch.Generator().manual_seed(0))[:, 1]
    tensor([0., 0., 0.])
    """
    drawn = torch.randn(k, len(acts), generator=generator).to(acts.device)
    return (drawn @ (acts - acts.mean(dim=0)).float()).cpu()
