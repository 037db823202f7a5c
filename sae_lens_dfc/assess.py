"""Everything that is measured of a trained crosscoder, beside the same of crosscoders trained on pairs with nothing to find."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.evaluate import Evaluation, evaluate
from sae_lens_dfc.judge import Judge
from sae_lens_dfc.metrics.behaviour import behaviour
from sae_lens_dfc.metrics.claims import LatentEvidence, ranking
from sae_lens_dfc.metrics.directions import Directions
from sae_lens_dfc.metrics.downstream import downstream
from sae_lens_dfc.metrics.judged import JudgedOptions, judged_behaviour, n_judgements
from sae_lens_dfc.metrics.scaling import directions
from sae_lens_dfc.metrics.spread import SE
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.nulls import NULLS, Case, beyond_null, null_case
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

logger = logging.getLogger(__name__)

N_NAMED = 12
"""Measures that are named when they could not be taken."""


@dataclass
class AssessOptions:
    """What is measured beyond what the activations show.

    Raises:
        ValueError: A number is negative.
    """

    nulls: list[str] = field(default_factory=lambda: ["self", "shuffle"])
    """Nulls to train and measure: self, shuffle, seed."""
    seed_model: ModelConfig | None = None
    """For the null seed."""
    downstream_pairs: int = 2000
    """Held-out pairs at which both models' predictions are measured with the reconstruction in place; 0 for none."""
    behaviour_latents: int = 6
    """Latents of each group with which both models are steered; 0 for none."""
    judge: Judge | None = None
    """Who compares the steered models' texts; none compares their next-token probabilities alone."""

    def __post_init__(self) -> None:
        for name in ("downstream_pairs", "behaviour_latents"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}.")


class Assessment(NamedTuple):
    """The measures of a run with those of its nulls, and its latents' evidence."""

    metrics: dict[str, float]
    run: Evaluation


def assess(crosscoder: Crosscoder, case: Case, options: AssessOptions) -> Assessment:
    """Measure a crosscoder, and train and measure one like it on each null.

    Args:
        crosscoder: The saved crosscoder.
        case: The models it was trained on, and their activations.
        options: Which nulls, and how much.

    Returns:
        The measures; those of a null under `null/NAME/`, and under `beyond_null/NAME/` the share of the run's candidates
        beyond the null's 95th percentile.
    """
    logger.info("Measuring the run")
    run = measure(crosscoder, case, options)
    metrics = dict(run.metrics)
    for name in options.nulls:
        logger.info("Null %s (%s): training a crosscoder like it", name, NULLS[name])
        null = null_case(name, case, options.seed_model)
        trained = train(null)
        logger.info("Null %s: measuring", name)
        found = measure(trained, null, options)
        metrics |= {f"null/{name}/{key}": value for key, value in found.metrics.items()}
        metrics |= {
            f"beyond_null/{name}/{key}": value
            for key, value in beyond_null(name, _evidence(run), _evidence(found)).items()
        }
    return Assessment(known(metrics), run)


def train(case: Case) -> Crosscoder:
    """A crosscoder of the case's settings, trained on its rows."""
    # One training among others: it writes nothing, and not into the history of the run on W&B either.
    logger_of_none = replace(case.cfg.logger, log_to_wandb=False)
    cfg = replace(case.cfg, output_path=None, checkpoint_path=None, n_checkpoints=0, resume=False)
    cfg = replace(cfg, cache_path=None, other_saes=[], n_ranks=1, logger=logger_of_none)
    return CrosscoderTrainingRunner(cfg, case.pair, case.data.training).run().to_inference()


def measure(crosscoder: Crosscoder, case: Case, options: AssessOptions) -> Evaluation:
    """All measures of one crosscoder on a case's held-out rows."""
    data, pair = case.data, case.pair
    stitching = data.stitching(crosscoder.cfg.d_a).to(crosscoder.device)
    acts = [rows.acts for rows in data.held_out]
    # Shuffled, a row's token is not B's any more.
    deciles = data.deciles(pair) if case.order_b is None else None
    found = evaluate(crosscoder, acts, stitching, deciles)
    metrics = found.metrics | data.metrics
    if options.downstream_pairs > 0:
        means = torch.cat([stitching.mean_a, stitching.mean_b])
        rows = data.held_out_with_text(options.downstream_pairs)
        metrics |= downstream(crosscoder, pair, rows, means, case.order_b)
    if options.behaviour_latents > 0:
        metrics |= _behaviour(crosscoder, case, found, stitching, options)
    return found._replace(metrics=metrics)


def _behaviour(
    crosscoder: Crosscoder,
    case: Case,
    found: Evaluation,
    stitching: Stitching,
    options: AssessOptions,
) -> dict[str, float]:
    groups = chosen(found, options.behaviour_latents)
    steered = latent_directions(crosscoder, found, stitching, groups)
    if not steered:
        return {}
    metrics = behaviour(case.pair, steered, groups).metrics
    if options.judge is not None:
        n = n_judgements(len(steered), JudgedOptions())
        logger.info("The judge is asked %d times for this crosscoder", n)
        metrics |= judged_behaviour(case.pair, steered, groups, options.judge).metrics
    return metrics


def chosen(found: Evaluation, n: int) -> dict[int, str]:
    """The latents of each group with the most evidence of being exclusive, and as many that both models have, with their group."""
    evidence = _evidence(found)
    order = ranking(evidence)
    fires = found.firing.maxima.cpu() > 0
    groups = {name: latents.cpu() & fires for name, latents in evidence.groups.items()}
    latents: dict[int, str] = {}
    for group in (A_EXCLUSIVE, B_EXCLUSIVE):
        members = order[groups[group][order]]
        latents |= dict.fromkeys(members[:n].tolist(), group)
    shared = groups[SHARED].nonzero()[:, 0]
    # Evenly over the dictionary, so that no measure chooses them.
    evenly = shared[torch.linspace(0, max(len(shared) - 1, 0), min(n, len(shared))).long()]
    return latents | dict.fromkeys(evenly.tolist(), SHARED)


def latent_directions(
    crosscoder: Crosscoder, found: Evaluation, stitching: Stitching, latents: Mapping[int, Any]
) -> dict[int, Directions]:
    """What each latent adds to both models at its largest activation; in its target its direction there, moved by the map."""
    moved, is_a = directions(crosscoder, stitching), _evidence(found).is_a
    d_a = crosscoder.cfg.d_a
    scaled = {i: moved[i].detach() * found.firing.maxima[i].to(moved) for i in latents}
    return {
        i: Directions(x[:d_a].cpu(), x[d_a:].cpu(), "a" if is_a[i] else "b")
        for i, x in scaled.items()
    }


def _evidence(found: Evaluation) -> LatentEvidence:
    assert found.evidence is not None  # `measure` maps the models
    return found.evidence


def known(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which JSON has no word for: what could not be measured is left out, and named in the log."""
    left_out = [name for name, value in metrics.items() if not math.isfinite(value)]
    named = [name for name in left_out if not name.endswith(SE)]
    if named:
        logger.warning(
            "Left out, since they are no finite numbers: %s%s",
            ", ".join(named[:N_NAMED]),
            f" and {len(named) - N_NAMED} more" if len(named) > N_NAMED else "",
        )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
