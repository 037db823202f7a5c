"""Both models' next-token predictions at paired positions, over the outcomes common to both
vocabularies, with one of the models changed."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.causal.downstream import check_whole, contexts_at_once
from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    Outcomes,
    common_outcomes,
    outcome_probabilities,
)
from sae_lens_dfc.analysis.steering.hooks import logits_from
from sae_lens_dfc.analysis.steering.splicing import Edit, SplicedReading, reading_of, spliced
from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelName

# Probabilities in float64 of so many rows and tokens are held at a time.
MAX_LOGITS = 2**24


class PairedTexts(NamedTuple):
    """Some contexts, with both models' tokens and activations at the hook."""

    pair: ModelPair
    outcomes: Mapping[ModelName, Outcomes]
    rows: PairedRows
    readings: Mapping[ModelName, SplicedReading]
    acts: Mapping[ModelName, Float[Tensor, "contexts pos d_m"]]

    def predictions(
        self, m: ModelName, change: Float[Tensor, "n d_m"] | None = None
    ) -> Float[Tensor, "n outcomes"]:
        """Model m's next-token probabilities at each row, with `change` added to its activations at
        the rows."""
        reading, acts = self.readings[m], self.acts[m]
        if change is not None:
            acts = spliced(reading, Edit(change, adds=True))(acts)
        where = reading.context, reading.position
        found = logits_from(self.pair.models[m], reading.ids, reading.mask, acts, *where)
        return outcome_probabilities(found, self.outcomes[m])


def paired_texts(
    pair: ModelPair, batches: Iterable[PairedRows], what: str
) -> Iterator[PairedTexts]:
    """Run both models up to their hooks on the rows' contexts, a few at a time.

    Args:
        pair: The two models, whole: not with `drop_unused_layers`.
        batches: Rows with their contexts.
        what: What is measured, for the progress bar.

    Raises:
        ValueError: A model was loaded without its upper layers.
    """
    check_whole(pair)
    of_a, of_b = common_outcomes(pair.a, pair.b)
    for rows in tqdm(list(batches), what, leave=False):
        for contexts in contexts_at_once(pair, rows.contexts, MAX_LOGITS):
            part, _ = rows_in(rows, contexts)
            readings: dict[ModelName, SplicedReading] = {}
            acts: dict[ModelName, Tensor] = {}
            for m, model in pair.models.items():
                readings[m] = reading_of(model, m, part)
                with torch.no_grad():
                    acts[m] = model.activations(readings[m].ids, readings[m].mask).float()
            yield PairedTexts(pair, {"a": of_a, "b": of_b}, part, readings, acts)
