"""Builds the model organism of a name."""

from sae_lens_dfc.models.packaged import DEMO_A, unpack
from sae_lens_dfc.organisms.finetune import fine_tuned
from sae_lens_dfc.organisms.from_scratch import from_scratch
from sae_lens_dfc.organisms.options import TOPIC
from sae_lens_dfc.organisms.organism import Organism


def organism_of(name: str, seed: int) -> Organism:
    """The organism of a name, built at the first call.

    Args:
        name: One of `NAMES`: behavior and strength, or topic.
        seed: Training seed; the same seed gives the same weights.
    """
    if name == TOPIC:
        return from_scratch(seed)
    behavior, strength = name.split("/")
    return fine_tuned(unpack(DEMO_A), behavior, strength, seed)
