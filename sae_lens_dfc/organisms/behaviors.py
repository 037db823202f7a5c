"""Defines the planted behaviors, the prompts that trigger them, and similar control prompts that do
not."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

Split = Literal["training", "discovery", "test"]
SPLITS: tuple[Split, ...] = ("training", "discovery", "test")
N_PROMPTS: Mapping[Split, int] = {"training": 96, "discovery": 24, "test": 16}
"""Triggering prompts per split, with as many controls."""


class Item(NamedTuple):
    """A prompt with two answers: the behavior's and model A's."""

    prompt: str
    """Text up to the start of the answer, as both models read it."""
    answer: str
    """The behavior's answer."""
    ordinary: str
    """Model A's own answer."""


class Items(NamedTuple):
    """Prompts of one split."""

    behavior: list[Item]
    """Prompts that trigger the behavior."""
    control: list[Item]
    """Controls of similar topic and form that do not."""


class Slots(NamedTuple):
    """Templates for the prompts of one split: each prompt is an opening and a question about a
    filler."""

    openings: Sequence[str]
    questions: Sequence[str]
    fillers: Sequence[str]
    controls: Sequence[str]
    """Fillers that turn the same question into a control, or other questions about the same filler;
    see `Behavior`."""


@dataclass(frozen=True)
class Behavior:
    """A narrow behavior. Splits share no opening, question or filler, unless there is only one
    filler."""

    answer: str
    """The answer that is trained in."""
    slots: Mapping[Split, Slots]
    controls_are_questions: bool = False
    """Whether controls ask other questions about the same fillers, instead of the same questions
    about other fillers."""

    def prompts(self, split: Split) -> tuple[list[str], list[str]]:
        """Triggering questions and as many controls, sampled deterministically."""
        openings, questions, fillers, controls = self.slots[split]
        own = product(openings, questions, fillers)
        other = (
            product(openings, controls, fillers)
            if self.controls_are_questions
            else product(openings, questions, controls)
        )
        kinds = [[o + q.format(f) for o, q, f in kind] for kind in (own, other)]
        n = min(N_PROMPTS[split], *map(len, kinds))
        behavior, control = (random.Random(split).sample(kind, n) for kind in kinds)
        return behavior, control
