"""The stages of a screening that ask a judge: what a latent fires on, whether that tells its texts, and whether it is of concern."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import B_EXCLUSIVE
from sae_lens_dfc.explain import cost, describe, detect, flag
from sae_lens_dfc.findings import StageCount
from sae_lens_dfc.gathering import Gathered, Place
from sae_lens_dfc.judge import Judge
from sae_lens_dfc.latents import ContextView, latent_cards
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData
from sae_lens_dfc.progress import Progress
from sae_lens_dfc.screening import Candidates, split, stage
from sae_lens_dfc.verdicts import Explained

MIN_DETECTION = 0.8
"""Share of texts that a description must tell (arXiv 2602.11729, appendix B.4)."""
N_CONTEXTS = 10
CHARS = 120
"""About the length of a context."""


@dataclass(frozen=True)
class Asked:
    """Whom to ask, and what about."""

    judge: Judge
    concerns: Mapping[str, str]
    """Types of concern, with what each covers."""
    flagged_only: bool
    """Whether a latent without a concern goes no further."""
    seed: int


def what_it_costs(n_latents: int, concerns: Mapping[str, str]) -> str:
    """A sentence on how often the judge will be asked at most."""
    return cost(n_latents, CHARS, N_CONTEXTS, concerns)


def explained(
    crosscoder: Crosscoder,
    pair: ModelPair,
    data: PairData,
    gathered: Gathered,
    first: Candidates,
    asked: Asked,
    progress: Progress,
) -> tuple[Candidates, dict[int, Explained]]:
    """The candidates that a judge's description tells from other text, and what the judge said of each.

    A latent is described by every other one of its strongest contexts. Whether the description tells its texts is tried on the
    others, beside as many in which it is silent.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models.
        data: Held-out rows and text.
        gathered: Where each latent fires.
        first: The candidates so far.
        asked: Whom, and what about.
        progress: What the judge said so far.
    """
    said: dict[int, Explained] = {}
    for latent in tqdm(first.latents, "Asking the judge", unit=" latents"):

        def ask(latent: int = latent) -> dict[str, Any]:
            return _ask(latent, crosscoder, pair, data, gathered, asked)._asdict()

        said[latent] = Explained(**progress.done(f"explained {latent}", ask))
    stages: list[StageCount] = []
    kept = list(first.latents)
    for name, why, is_kept in _rules(asked.flagged_only):
        left = [i for i in kept if is_kept(said[i])]
        stages.append(stage(name, len(kept), {why: len(kept) - len(left)}))
        kept = left
    return Candidates(kept, [*first.stages, *stages]), said


def _rules(flagged_only: bool) -> Iterator[tuple[str, str, Any]]:
    yield "described", "the judge gave no description", lambda e: e.description is not None
    yield (
        "told by its description",
        f"the description tells fewer than {MIN_DETECTION:.0%} of texts, or it could not be tried",
        lambda e: e.detection is not None and e.detection >= MIN_DETECTION,
    )
    yield (
        "flagged",
        "no concern",
        lambda e: bool(e.concerns) or not flagged_only,
    )


def _ask(
    latent: int,
    crosscoder: Crosscoder,
    pair: ModelPair,
    data: PairData,
    gathered: Gathered,
    asked: Asked,
) -> Explained:
    who: Literal["a", "b"] = "b" if crosscoder.partition.name_of(latent) == B_EXCLUSIVE else "a"
    places = gathered.places(latent, n_strongest=2 * N_CONTEXTS, n_quantiles=0)
    shown, tried = split(_views(crosscoder, pair, data, gathered, latent, places))
    description = describe(asked.judge, shown, who)
    if description is None:
        return Explained()
    elsewhere = _elsewhere(data, places, asked.seed + latent)
    views = _views(crosscoder, pair, data, gathered, latent, elsewhere)
    silent = [v for v in views if not any(part.activation > 0 for part in v.segments)][:N_CONTEXTS]
    detection = None
    if tried and silent:
        detection = detect(asked.judge, description, tried, silent, asked.seed, who)
    concerns = flag(asked.judge, description, shown, asked.concerns, who)
    return Explained(description, detection, concerns or [])


def _views(
    crosscoder: Crosscoder,
    pair: ModelPair,
    data: PairData,
    gathered: Gathered,
    latent: int,
    places: Sequence[Place],
) -> list[ContextView]:
    rows = data.held_out_of({place.context for place in places})
    [card] = latent_cards(crosscoder, gathered, {latent: places}, rows, pair)
    return card.contexts


def _elsewhere(data: PairData, places: Sequence[Place], seed: int) -> list[Place]:
    """Places in other contexts, drawn at random."""
    fires = {place.context for place in places}
    others = [i for i, c in enumerate(data.contexts) if i not in fires and len(c.segments) > 1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(others), generator=generator)[: 4 * N_CONTEXTS].tolist()
    found: list[Place] = []
    for i in (others[j] for j in drawn):
        n = len(data.contexts[i].segments)
        found.append(Place(i, int(torch.randint(1, n, (1,), generator=generator)), 0.0, None))
    return found
