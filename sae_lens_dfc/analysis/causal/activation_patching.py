"""Tests a latent causally: ablates its model-specific contribution in one model, or adds it to the
other, and measures how far the predictions change and whether the models become more alike."""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    check_no_nan,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.steering.hooks import logits_at_end
from sae_lens_dfc.analysis.steering.latent_acts import latent_acts
from sae_lens_dfc.analysis.steering.splicing import Edit, SplicedReading, readings_of, spliced
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, paired_activations, rows_in
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.significance import Effect


class ModelSpecificDirection(NamedTuple):
    """The part of a latent's decoder direction that is specific to one model, per unit of
    activation."""

    latent: int
    source: ModelName
    """The model that the direction is specific to."""
    own: Float[Tensor, " d_source"]
    """Its decoder direction minus the other model's mapped into it; for an exclusive latent, the
    whole decoder direction."""
    moved: Float[Tensor, " d_target"]
    """The same, mapped into the other model."""


def own_part(
    of_a: Float[Tensor, "d_sae d_a"],
    of_b: Float[Tensor, "d_sae d_b"],
    latent: int,
    source: ModelName,
) -> ModelSpecificDirection:
    """One latent's direction from `both_decoder_differences`. In the target model it is the
    negative of the target's own difference, since it is what the target lacks."""
    both = {"a": of_a[latent], "b": of_b[latent]}
    return ModelSpecificDirection(latent, source, both[source], -both[OTHER[source]])


class Texts(NamedTuple):
    """Texts that end where a latent fires, with both models' tokens and activations."""

    rows: PairedRows
    feature_acts: Float[Tensor, " n"]
    """The latent's activation at each row."""
    readings: Mapping[ModelName, SplicedReading]
    acts: Mapping[ModelName, Tensor]
    """Each model's activations at its hook."""

    @property
    def at_end(self) -> Float[Tensor, " texts"]:
        """The latent's activation at the end of each text."""
        return self.feature_acts[self._ends]

    def with_activation(self, value: float) -> "Texts":
        """The same texts, with the latent's activation set to `value` at their ends and to 0
        elsewhere."""
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
    n_after: int = 0,
) -> Texts:
    """Run both models on the windows, and keep those at whose end the latent fires (or does not);
    possibly none.

    Windows with a NaN or infinite activation in a model are dropped: all later predictions would be
    NaN.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole.
        latent: The latent.
        windows: Texts, each after the pair's beginning-of-sequence segment.
        fires: Whether to keep windows at whose end it fires, or those at whose end it does not.
        n_after: Number of segments of each window after its end in this sense.
    """
    contexts = [Context(window, i, i) for i, window in enumerate(windows)]
    batch = ContextBatch(contexts, {})
    # No outlier filter: the latent may fire on outliers, and a few texts give no reliable median.
    rows = next(iter(paired_activations(pair, [batch], PairCounts(), outlier_factor=float("inf"))))
    feature_acts = latent_acts(crosscoder, rows.acts, [latent])[:, 0].float().cpu()
    ends = torch.tensor([len(window) - 1 - n_after for window in windows])
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
    """Restrict the rows to the contexts with these numbers, and run both models on them."""
    rows, here = rows_in(rows, [c for c in rows.contexts if c.number in numbers])
    readings, acts = readings_of(pair, rows) if rows.contexts else ({}, {})
    return Texts(rows, feature_acts[here], readings, acts)


class Verification(NamedTuple):
    """Effects on the next-token probabilities, in bits of Jensen-Shannon divergence."""

    baseline_js_bits: float
    """The two models' divergence without intervention, from 0 to 1; an upper bound on how much
    closer they become."""
    ablated: Effect
    """How much closer the models become when the model-specific direction is ablated in its source
    model."""
    patched: Effect
    """How much closer they become when it is added to the other model."""
    used: Effect
    """How far the source model's own probabilities move when the direction is ablated in it."""


class _NextToken(NamedTuple):
    """A model's next-token probabilities at the end of each text."""

    common: Float[Tensor, "texts outcomes"]
    """Over the outcomes common to both vocabularies."""
    own: Float[Tensor, "texts d_vocab"] | None
    """Over its own vocabulary; none of the model that the latent is not specific to."""


@torch.no_grad()
def verify(
    pair: ModelPair,
    texts: Texts,
    own: ModelSpecificDirection,
    controls: Mapping[str, Mapping[ModelName, Float[Tensor, "_ _"]]],
    outcomes: tuple[Outcomes, Outcomes] | None = None,
) -> Verification:
    """Test whether a model uses a latent's model-specific contribution, and whether the models
    become more alike when it is ablated in the source, and when it is added to the other model.

    With `f` the latent's activation, every paired position is changed to `x_s - f own` in the
    source or to `x_t + f moved` in the other model. The next-token probabilities at the end of each
    text are compared over the outcomes common to both vocabularies (`common_outcomes`). The effect
    is `JS(p_a, p_b)` without intervention minus `JS` with one model changed, positive if the change
    brings the models closer. A real difference between the models is expected to have both effects;
    a quirk of one direction is not. Whether the source uses the direction needs neither the other
    model nor a map: it is `JS` between the source's probabilities of its own tokens without and
    with the ablation.

    Args:
        pair: The two models.
        texts: Texts at whose end the latent fires.
        own: The latent's model-specific direction.
        controls: Control directions for each model, by kind; rescaled to the norm of the tested
            direction.
        outcomes: Outcomes common to both models; computed by default.

    Raises:
        ValueError: There are no texts, or a model's probabilities are NaN.
    """
    if not texts.rows.contexts:
        raise ValueError(
            f"Latent {own.latent} fires at the end of none of the texts. Give other texts."
        )
    of_models = dict(zip(("a", "b"), outcomes or common_outcomes(pair.a, pair.b), strict=True))

    def next_token(m: ModelName, direction: Tensor | None) -> _NextToken:
        reading, acts = texts.readings[m], texts.acts[m]
        if direction is not None:
            change = texts.feature_acts.to(acts)[:, None] * direction.to(acts)
            acts = spliced(reading, Edit(change, adds=True))(acts)
        found = logits_at_end(pair.models[m], reading.ids, reading.mask, acts)
        common = outcome_probabilities(found, of_models[m]).cpu()
        check_no_nan(m, common, direction is not None)
        return _NextToken(common, found.float().softmax(dim=-1).cpu() if m == own.source else None)

    untouched = {m: next_token(m, None) for m in pair.models}
    baseline = jensen_shannon(untouched["a"].common, untouched["b"].common)

    def moved(m: ModelName, direction: Tensor) -> dict[str, Tensor]:
        after, other = next_token(m, direction), untouched[OTHER[m]]
        found = {"closer": baseline - jensen_shannon(after.common, other.common)}
        before = untouched[m].own
        if after.own is not None and before is not None:
            found["moved"] = jensen_shannon(after.own, before)
        return found

    def effects(m: ModelName, direction: Tensor) -> dict[str, Effect]:
        norm = direction.float().norm()
        found = moved(m, direction)
        beside = {
            kind: [moved(m, one * norm) for one in normalize(of_models[m].float())]
            for kind, of_models in controls.items()
        }
        return {
            name: Effect(
                values,
                {kind: torch.stack([one[name] for one in ones]) for kind, ones in beside.items()},
            )
            for name, values in found.items()
        }

    ablated, patched = effects(own.source, -own.own), effects(OTHER[own.source], own.moved)
    return Verification(
        baseline.mean().item(), ablated["closer"], patched["closer"], ablated["moved"]
    )


def drawn_directions(
    acts: Float[Tensor, "n d"], k: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Random directions with the covariance of a model's activations, so that they lie in
    directions the model uses.

    >>> rows = torch.tensor([[0.0, 5.0], [1.0, 5.0]])
    >>> drawn_directions(rows, 3, torch.Generator().manual_seed(0))[:, 1]
    tensor([0., 0., 0.])
    """
    drawn = torch.randn(k, len(acts), generator=generator).to(acts.device)
    return (drawn @ (acts - acts.mean(dim=0)).float()).cpu()
