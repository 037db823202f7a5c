"""Both models' next-token predictions at paired positions, over the outcomes common to both
vocabularies, with one of the models changed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.causal.downstream import contexts_at_once
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    check_no_nan,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.steering.hooks import logits_from
from sae_lens_dfc.analysis.steering.splicing import Edit, SplicedReading, readings_of, spliced
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps

# Predictions held at a time, in float64: 128 positions of a vocabulary of 262,144 tokens.
MAX_LOGITS = 2**25


@dataclass(frozen=True)
class ModelDifference:
    """Two models, and what a crosscoder says of their difference."""

    crosscoder: Crosscoder
    pair: ModelPair
    """The two models, whole: not with `drop_unused_layers`."""
    own: Mapping[ModelName, Float[Tensor, "d_sae d_m"]]
    """Each latent's model-specific directions; see `both_decoder_differences`."""
    affine_maps: AffineMaps | None
    """Affine maps between the models; none if both share one basis."""


class PairedTexts(NamedTuple):
    """Some contexts, with both models' tokens and activations at the hook."""

    pair: ModelPair
    outcomes: Mapping[ModelName, Outcomes]
    rows: PairedRows
    compared: Int[Tensor, " n"]
    """The rows at which predictions are compared: all, or as many as fit, evenly spaced."""
    readings: Mapping[ModelName, SplicedReading]
    acts: Mapping[ModelName, Float[Tensor, "contexts pos d_m"]]

    def predictions(
        self, m: ModelName, change: Float[Tensor, "rows d_m"] | None = None
    ) -> Float[Tensor, "n outcomes"]:
        """Model m's next-token probabilities at the compared rows, with `change` added to its
        activations at all rows.

        Raises:
            ValueError: A probability is NaN.
        """
        reading, acts = self.readings[m], self.acts[m]
        if change is not None:
            acts = spliced(reading, Edit(change, adds=True))(acts)
        where = reading.context[self.compared], reading.position[self.compared]
        found = logits_from(self.pair.models[m], reading.ids, reading.mask, acts, *where)
        probabilities = outcome_probabilities(found, self.outcomes[m])
        check_no_nan(m, probabilities, change is not None)
        return probabilities


def paired_texts(
    pair: ModelPair, rows: PairedRows, outcomes: Mapping[ModelName, Outcomes]
) -> Iterator[PairedTexts]:
    """Run both models up to their hooks on the rows' contexts, as many at a time as fit.

    Args:
        pair: The two models, whole.
        rows: Rows with their contexts.
        outcomes: Outcomes common to both models.
    """
    at_once = MAX_LOGITS // max(int(model.model.cfg.d_vocab) for model in pair.models.values())
    for contexts in contexts_at_once(pair, rows.contexts, MAX_LOGITS):
        part, _ = rows_in(rows, contexts)
        n = len(part.acts)
        compared = torch.linspace(0, n - 1, min(n, max(1, at_once))).long()
        yield PairedTexts(pair, outcomes, part, compared, *readings_of(pair, part))
