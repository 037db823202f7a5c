"""The rows a crosscoder of an organism is trained on: ordinary text, and a minority of what shows the behaviour."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae_lens_dfc.activations import PairedRows, paired_activations
from sae_lens_dfc.benchmark.planted.organism import Organism
from sae_lens_dfc.contexts import Context, ContextBatch, PairCounts, bucketed
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import reference_pages, split_text

CONTEXT_SIZE = 128
BATCH_SIZE_PROMPTS = 16
MIN_CHARS = 200


class Harvest(NamedTuple):
    """Rows to train on."""

    rows: list[PairedRows]
    behaviour_share: float
    """Share of the rows that are of prompts for the behaviour."""


def ordinary_texts(max_chars: int, n: int, seed: int) -> list[str]:
    """Stretches of Python's reference, in an order drawn from `seed`."""
    pieces = (piece for page in reference_pages() for piece in split_text(page, max_chars))
    long_enough = [piece for piece in pieces if len(piece) >= MIN_CHARS]
    return random.Random(seed).sample(long_enough, min(n, len(long_enough)))


def training_texts(organism: Organism, n_texts: int, seed: int) -> tuple[list[str], list[str]]:
    """What shows the behaviour, and other text: controls, general questions and stretches of Python's reference.

    Each prompt for the behaviour comes with both answers, the planted and the ordinary one, as both models'
    answers do in arXiv 2603.04426.

    Args:
        organism: Its training prompts are read, no other.
        n_texts: Stretches of the reference.
        seed: Of their choice.
    """
    items = organism.items["training"]
    shown = [i.prompt + answer for i in items.behaviour for answer in (i.answer, i.ordinary)]
    others = [i.prompt + i.ordinary for i in items.control] + organism.general
    return shown, others + ordinary_texts(4 * CONTEXT_SIZE, n_texts, seed)


def harvest(pair: ModelPair, organism: Organism, n_texts: int, seed: int) -> Harvest:
    """Both models' activations on `training_texts`.

    Args:
        pair: The organism's models.
        organism: What is planted.
        n_texts: Stretches of ordinary text.
        seed: Of their choice.
    """
    shown, others = training_texts(organism, n_texts, seed)
    own, rest = read(pair, shown), read(pair, others)
    n_own, n_rest = (sum(len(rows.acts) for rows in part) for part in (own, rest))
    return Harvest(own + rest, n_own / (n_own + n_rest))


def read(pair: ModelPair, texts: Sequence[str]) -> list[PairedRows]:
    """Rows of whole texts, each read from its start."""
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
