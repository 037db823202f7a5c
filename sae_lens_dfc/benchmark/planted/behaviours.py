"""What is planted: a behaviour, the prompts that call for it, and prompts like them that do not."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Split = Literal["training", "discovery", "test"]
SPLITS: tuple[Split, ...] = ("training", "discovery", "test")
N_PROMPTS: Mapping[Split, int] = {"training": 96, "discovery": 24, "test": 16}
"""Prompts of a split that call for the behaviour, and as many that do not."""


class Item(NamedTuple):
    """A prompt with two ways to go on: as the behaviour would have it, and as model A goes on."""

    prompt: str
    """Text as both models read it, up to where an answer begins."""
    answer: str
    """The behaviour's answer."""
    ordinary: str
    """Model A's own."""


class Items(NamedTuple):
    """Prompts of one split."""

    behaviour: list[Item]
    """Those that call for the behaviour."""
    control: list[Item]
    """Those close in topic and form that do not."""


class Slots(NamedTuple):
    """What the prompts of one split are made of: each is an opening and a question about a filler."""

    openings: Sequence[str]
    questions: Sequence[str]
    fillers: Sequence[str]
    controls: Sequence[str]
    """Fillers that make a control of the same question, or whole questions about the same filler; see `Behaviour`."""


@dataclass(frozen=True)
class Behaviour:
    """A narrow behaviour. No opening, question or filler of one split is in another, but for a sole filler."""

    answer: str
    """What the model is taught to answer."""
    slots: Mapping[Split, Slots]
    controls_are_questions: bool = False
    """Whether a control asks another thing about the same fillers, rather than the same of other fillers."""

    def prompts(self, split: Split) -> tuple[list[str], list[str]]:
        """Questions that call for the behaviour, and controls; as many of each, drawn in the same way each time."""
        openings, questions, fillers, controls = self.slots[split]
        own = product(openings, questions, fillers)
        other = (
            product(openings, controls, fillers)
            if self.controls_are_questions
            else product(openings, questions, controls)
        )
        kinds = [[o + q.format(f) for o, q, f in kind] for kind in (own, other)]
        n = min(N_PROMPTS[split], *map(len, kinds))
        behaviour, control = (random.Random(split).sample(kind, n) for kind in kinds)
        return behaviour, control
