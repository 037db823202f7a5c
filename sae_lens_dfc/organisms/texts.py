"""Texts to train an organism's crosscoders on: ordinary text, and a minority that shows the
behavior."""

import random

from sae_lens_dfc.data.text.cleaning import split_text
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.organisms.organism import Organism

N_PASSAGES = 120
"""Number of passages of ordinary text."""
MIN_CHARS, MAX_CHARS = 200, 512
"""Length of a passage in characters."""


def training_texts(organism: Organism, n_passages: int, seed: int) -> tuple[list[str], list[str]]:
    """Text that shows the behavior, and other text: controls, general questions and passages of
    Python's reference documentation.

    Each prompt that triggers the behavior comes with both the planted and the ordinary answer, like
    both models' answers in arXiv 2603.04426.

    Args:
        organism: The organism; only its training prompts are used.
        n_passages: Number of passages of the reference documentation.
        seed: Of their choice.
    """
    items = organism.items["training"]
    shown = [i.prompt + answer for i in items.behavior for answer in (i.answer, i.ordinary)]
    others = [i.prompt + i.ordinary for i in items.control] + organism.general
    return shown, others + _passages(n_passages, seed)


def _passages(n: int, seed: int) -> list[str]:
    """Passages of Python's reference documentation, shuffled with `seed`."""
    pieces = (piece for page in reference_pages() for piece in split_text(page, MAX_CHARS))
    long_enough = [piece for piece in pieces if len(piece) >= MIN_CHARS]
    return random.Random(seed).sample(long_enough, min(n, len(long_enough)))
