"""Harvests the activations to train an organism's crosscoders on: ordinary text, and a minority
that shows the behavior."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts, bucketed
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.organisms.organism import Organism
from sae_lens_dfc.organisms.texts import training_texts

CONTEXT_SIZE = 128
BATCH_SIZE_PROMPTS = 16


class HarvestedRows(NamedTuple):
    """Rows for training."""

    rows: list[PairedRows]
    behavior_share: float
    """Share of rows from prompts that trigger the behavior."""


def harvest(pair: ModelPair, organism: Organism, n_texts: int, seed: int) -> HarvestedRows:
    """Both models' activations on `training_texts`.

    Args:
        pair: The organism's models.
        organism: The organism.
        n_texts: Number of passages of ordinary text.
        seed: Of their choice.
    """
    shown, others = training_texts(organism, n_texts, seed)
    own, rest = read(pair, shown), read(pair, others)
    n_own, n_rest = (sum(len(rows.acts) for rows in part) for part in (own, rest))
    return HarvestedRows(own + rest, n_own / (n_own + n_rest))


def read(pair: ModelPair, texts: Sequence[str]) -> list[PairedRows]:
    """Rows of complete texts, each read from its start."""
    contexts = [
        Context(pair.segments(text)[0][: CONTEXT_SIZE - 1].after(pair.bos_segment), i, i)
        for i, text in enumerate(texts)
    ]
    batches = bucketed(contexts, BATCH_SIZE_PROMPTS, CONTEXT_SIZE, seed="")
    rows = paired_activations(pair, [ContextBatch(batch, {}) for batch in batches], PairCounts())
    return [r._replace(contexts=()) for r in rows]


def joined(rows: Sequence[PairedRows]) -> torch.Tensor:
    """All activations as one tensor."""
    return torch.cat([r.acts for r in rows])
