"""Runs the judge's stages of a screening: describe a latent, score the description by detection,
and flag concerns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.autointerp.explain import cost, describe, detect, flag
from sae_lens_dfc.analysis.autointerp.judge import Judge
from sae_lens_dfc.analysis.latents.cards import ContextView, latent_cards
from sae_lens_dfc.analysis.latents.max_activating import FiringPosition
from sae_lens_dfc.analysis.report.findings import StageCount
from sae_lens_dfc.analysis.screening.candidates import Candidates, split, stage
from sae_lens_dfc.analysis.screening.causal_tests import Subject
from sae_lens_dfc.analysis.screening.verdicts import Explained
from sae_lens_dfc.core.journal import Journal
from sae_lens_dfc.crosscoders.groups import B_EXCLUSIVE
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.models.config import ModelName

MIN_DETECTION = 0.8
"""Minimum detection score of a description (arXiv 2602.11729, appendix B.4)."""
N_CONTEXTS = 10
CHARS = 120
"""Approximate characters of a context."""


@dataclass(frozen=True)
class Asked:
    """The judge, and what to ask."""

    judge: Judge
    concerns: Mapping[str, str]
    """Types of concern, with what each covers."""
    flagged_only: bool
    """Whether to drop latents without a concern."""
    seed: int


def what_it_costs(n_latents: int, concerns: Mapping[str, str]) -> str:
    """The maximum number of questions to the judge, as a sentence."""
    return cost(n_latents, CHARS, N_CONTEXTS, concerns)


def explained(
    on: Subject, first: Candidates, asked: Asked, progress: Journal
) -> tuple[Candidates, dict[int, Explained]]:
    """The candidates whose descriptions pass detection, and the judge's answers on each.

    A latent is described from every other one of its top contexts. Detection uses the remaining
    ones, with as many contexts in which it is silent.

    Args:
        on: The crosscoder with its models, text and examples.
        first: Candidates of the previous stages.
        asked: The judge, and what to ask.
        progress: Stored answers of the judge, for resuming.
    """
    said: dict[int, Explained] = {}
    for latent in tqdm(first.latents, "Asking the judge", unit=" latents"):

        def ask(latent: int = latent) -> dict[str, Any]:
            return _ask(on, latent, asked)._asdict()

        said[latent] = Explained(**progress.done(f"explained {latent}", ask))
    stages: list[StageCount] = []
    kept = list(first.latents)
    for name, why, is_kept in _rules(asked.flagged_only):
        left = [i for i in kept if is_kept(said[i])]
        stages.append(stage(name, len(kept), {why: len(kept) - len(left)}))
        kept = left
    return first._replace(latents=kept, stages=[*first.stages, *stages]), said


def _rules(flagged_only: bool) -> Iterator[tuple[str, str, Any]]:
    yield "described", "the judge gave no description", lambda e: e.description is not None
    yield (
        "predicted by its description",
        f"the description's detection score is below {MIN_DETECTION:.0%}, or could not be measured",
        lambda e: e.detection is not None and e.detection >= MIN_DETECTION,
    )
    yield (
        "flagged",
        "no concern",
        lambda e: bool(e.concerns) or not flagged_only,
    )


def _ask(on: Subject, latent: int, asked: Asked) -> Explained:
    who: ModelName = "b" if on.crosscoder.partition.name_of(latent) == B_EXCLUSIVE else "a"
    places = on.gathered.places(latent, n_strongest=2 * N_CONTEXTS, n_quantiles=0)
    shown, tried = split(_views(on, latent, places))
    description = describe(asked.judge, shown, who)
    if description is None:
        return Explained()
    elsewhere = _elsewhere(on.data, places, asked.seed + latent)
    views = _views(on, latent, elsewhere)
    silent = [v for v in views if not any(part.activation > 0 for part in v.segments)][:N_CONTEXTS]
    detection = None
    if tried and silent:
        detection = detect(asked.judge, description, tried, silent, asked.seed, who)
    concerns = flag(asked.judge, description, shown, asked.concerns, who)
    return Explained(description, detection, concerns or [])


def _views(on: Subject, latent: int, places: Sequence[FiringPosition]) -> list[ContextView]:
    rows = on.data.held_out_of({place.context for place in places})
    [card] = latent_cards(on.crosscoder, on.gathered, {latent: places}, rows, on.pair)
    return card.contexts


def _elsewhere(data: PairData, places: Sequence[FiringPosition], seed: int) -> list[FiringPosition]:
    """Random places in other contexts."""
    fires = {place.context for place in places}
    others = [i for i, c in enumerate(data.contexts) if i not in fires and len(c.segments) > 1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(others), generator=generator)[: 4 * N_CONTEXTS].tolist()
    found: list[FiringPosition] = []
    for i in (others[j] for j in drawn):
        n = len(data.contexts[i].segments)
        found.append(
            FiringPosition(i, int(torch.randint(1, n, (1,), generator=generator)), 0.0, None)
        )
    return found
