"""Computes all measures of a trained crosscoder, and the same measures of crosscoders trained on
null pairs."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from sae_lens_dfc.analysis.autointerp.judge import Judge
from sae_lens_dfc.analysis.causal.behavior import behavior
from sae_lens_dfc.analysis.causal.directions import Directions
from sae_lens_dfc.analysis.causal.downstream import downstream
from sae_lens_dfc.analysis.causal.judged_behavior import (
    JudgedOptions,
    judged_behavior,
    n_judgments,
)
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.report.results import drop_nonfinite
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS, beyond_null
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking
from sae_lens_dfc.metrics.exclusivity.latent_scaling import directions
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

logger = logging.getLogger(__name__)


@dataclass
class AssessOptions:
    """Options for nulls and causal measures.

    Raises:
        ValueError: A number is negative.
    """

    nulls: list[str] = field(default_factory=lambda: ["self", "shuffle"])
    """Nulls to train on and measure: self, shuffle, seed."""
    seed_model: ModelConfig | None = None
    """Model for the `seed` null."""
    downstream_pairs: int = 2000
    """Held-out pairs on which the next-token loss with spliced reconstructions is measured; 0 skips
    this."""
    behavior_latents: int = 6
    """Latents per group used to steer both models; 0 skips this."""
    judge: Judge | None = None
    """LLM judge that compares the steered models' texts; none compares only next-token
    probabilities."""

    def __post_init__(self) -> None:
        for name in ("downstream_pairs", "behavior_latents"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}.")


class Assessment(NamedTuple):
    """Measures of a run and its nulls, and its latents' exclusivity evidence."""

    metrics: dict[str, float]
    run: Evaluation


def assess(crosscoder: Crosscoder, case: PairTask, options: AssessOptions) -> Assessment:
    """Measure a crosscoder, then train and measure one with the same settings on each null.

    Args:
        crosscoder: The saved crosscoder.
        case: The models it was trained on, with their activations.
        options: Which nulls and causal measures to compute.

    Returns:
        The measures. Those of a null are under `null/NAME/`, and the share of the run's candidates
        beyond the null's 95th percentile is under `beyond_null/NAME/`.
    """
    logger.info("Measuring the run")
    run = measure(crosscoder, case, options)
    metrics = dict(run.metrics)
    for name in options.nulls:
        logger.info("Null %s (%s): training a crosscoder like it", name, NULLS[name])
        null = null_case(name, case, options.seed_model)
        trained = train_crosscoder(null)
        logger.info("Null %s: measuring", name)
        found = measure(trained, null, options)
        del null  # free its rows before the next null is built
        metrics |= {f"null/{name}/{key}": value for key, value in found.metrics.items()}
        metrics |= {
            f"beyond_null/{name}/{key}": value
            for key, value in beyond_null(name, _evidence(run), _evidence(found)).items()
        }
    return Assessment(drop_nonfinite(metrics), run)


def train_crosscoder(case: PairTask) -> Crosscoder:
    """Train a crosscoder with the case's settings on its rows."""
    # An auxiliary training: it writes no files and does not log to the run on W&B.
    logger_of_none = replace(case.cfg.logger, log_to_wandb=False)
    cfg = replace(case.cfg, output_path=None, checkpoint_path=None, n_checkpoints=0, resume=False)
    cfg = replace(cfg, cache_path=None, other_saes=[], n_ranks=1, logger=logger_of_none)
    return CrosscoderTrainingRunner(cfg, case.pair, case.data.training).run().to_inference()


def measure(crosscoder: Crosscoder, case: PairTask, options: AssessOptions) -> Evaluation:
    """All measures of one crosscoder on a case's held-out rows."""
    data, pair = case.data, case.pair
    affine_maps = data.affine_maps(crosscoder.cfg.d_a).to(crosscoder.device)
    acts = [rows.acts for rows in data.held_out]
    # With shuffled pairs, a row's token no longer matches B's activation.
    deciles = data.deciles(pair) if case.order_b is None else None
    found = evaluate(crosscoder, acts, affine_maps, deciles)
    metrics = found.metrics | data.metrics
    if options.downstream_pairs > 0:
        means = torch.cat([affine_maps.mean_a, affine_maps.mean_b])
        rows = data.held_out_with_text(options.downstream_pairs)
        metrics |= downstream(crosscoder, pair, rows, means, case.order_b)
    if options.behavior_latents > 0:
        metrics |= _behavior(crosscoder, case, found, affine_maps, options)
    return found._replace(metrics=metrics)


def _behavior(
    crosscoder: Crosscoder,
    case: PairTask,
    found: Evaluation,
    affine_maps: AffineMaps,
    options: AssessOptions,
) -> dict[str, float]:
    groups = chosen(found, options.behavior_latents)
    steered = latent_directions(crosscoder, found, affine_maps, groups)
    if not steered:
        return {}
    metrics = behavior(case.pair, steered, groups).metrics
    if options.judge is not None:
        n = n_judgments(len(steered), JudgedOptions())
        logger.info("The judge is asked %d times for this crosscoder", n)
        metrics |= judged_behavior(case.pair, steered, groups, options.judge).metrics
    return metrics


def chosen(found: Evaluation, n: int) -> dict[int, str]:
    """The latents of each group with the most evidence of being exclusive, and as many shared ones,
    with their group."""
    evidence = _evidence(found)
    order = ranking(evidence)
    fires = found.firing.maxima.cpu() > 0
    groups = {name: latents.cpu() & fires for name, latents in evidence.groups.items()}
    latents: dict[int, str] = {}
    for group in (A_EXCLUSIVE, B_EXCLUSIVE):
        members = order[groups[group][order]]
        latents |= dict.fromkeys(members[:n].tolist(), group)
    shared = groups[SHARED].nonzero()[:, 0]
    # Evenly spaced over the dictionary, so that no measure selects them.
    evenly = shared[torch.linspace(0, max(len(shared) - 1, 0), min(n, len(shared))).long()]
    return latents | dict.fromkeys(evenly.tolist(), SHARED)


def latent_directions(
    crosscoder: Crosscoder, found: Evaluation, affine_maps: AffineMaps, latents: Mapping[int, Any]
) -> dict[int, Directions]:
    """Each latent's steering vectors in both models at its maximum activation; in the target model,
    the direction mapped from the source."""
    moved, is_a = directions(crosscoder, affine_maps), _evidence(found).is_a
    d_a = crosscoder.cfg.d_a
    scaled = {i: moved[i].detach() * found.firing.maxima[i].to(moved) for i in latents}
    return {
        i: Directions(x[:d_a].cpu(), x[d_a:].cpu(), "a" if is_a[i] else "b")
        for i, x in scaled.items()
    }


def _evidence(found: Evaluation) -> LatentEvidence:
    assert found.evidence is not None  # `measure` maps the models
    return found.evidence
