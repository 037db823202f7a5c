"""Harvests the activations to train an organism's crosscoders on: ordinary text, and a minority
that shows the behavior."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae_lens_dfc.benchmark.planted.organisms.organism import Organism
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import Context, ContextBatch, PairCounts, bucketed
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cleaning import split_text
from sae_lens_dfc.data.text.cpython_docs import reference_pages

CONTEXT_SIZE = 128
BATCH_SIZE_PROMPTS = 16
MIN_CHARS = 200


class HarvestedRows(NamedTuple):
    """Rows for training."""

    rows: list[PairedRows]
    behavior_share: float
    """Share of rows from prompts that trigger the behavior."""


def ordinary_texts(max_chars: int, n: int, seed: int) -> list[str]:
    """Passages of Python's reference documentation, shuffled with `seed`."""
    pieces = (piece for page in reference_pages() for piece in split_text(page, max_chars))
    long_enough = [piece for piece in pieces if len(piece) >= MIN_CHARS]
    return random.Random(seed).sample(long_enough, min(n, len(long_enough)))


def training_texts(organism: Organism, n_texts: int, seed: int) -> tuple[list[str], list[str]]:
    """Text that shows the behavior, and other text: controls, general questions and passages of
    Python's reference documentation.

    Each prompt that triggers the behavior comes with both the planted and the ordinary answer, like
    both models' answers in arXiv 2603.04426.

    Args:
        organism: The organism; only its training prompts are used.
        n_texts: Number of passages of the reference documentation.
        seed: Of their choice.
    """
    items = organism.items["training"]
    shown = [i.prompt + answer for i in items.behavior for answer in (i.answer, i.ordinary)]
    others = [i.prompt + i.ordinary for i in items.control] + organism.general
    return shown, others + ordinary_texts(4 * CONTEXT_SIZE, n_texts, seed)


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
