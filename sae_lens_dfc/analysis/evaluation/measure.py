"""Trains a crosscoder on a pair's rows, and computes all measures of one on the held-out rows."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from sae_lens_dfc.analysis.causal.mapped_loss import mapped_loss
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, ranking
from sae_lens_dfc.metrics.exclusivity.known import fit_probes
from sae_lens_dfc.metrics.exclusivity.latent_scaling import directions
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

logger = logging.getLogger(__name__)


@dataclass
class CausalOptions:
    """Which measures to take by intervening on the models.

    Raises:
        ValueError: A number is negative.
    """

    downstream_pairs: int = 0
    """Held-out pairs on which the next-token loss with spliced reconstructions, and with the other
    model's mapped activations, is measured; 0 skips this."""
    behavior_latents: int = 0
    """Latents per group used to steer both models; 0 skips this."""
    judge: Judge | None = None
    """LLM judge that compares the steered models' texts; none compares only next-token
    probabilities."""

    def __post_init__(self) -> None:
        require(self, ("downstream_pairs", "behavior_latents"), "at least 0")


def train_crosscoder(case: PairTask) -> Crosscoder:
    """Train a crosscoder with the case's settings on its rows."""
    cfg = replace(case.cfg.without_output(), cache_path=None, other_saes=[], n_ranks=1)
    return CrosscoderTrainingRunner(cfg, case.pair, case.data.training).run().to_inference()


def measure(
    crosscoder: Crosscoder, case: PairTask, options: CausalOptions | None = None
) -> Evaluation:
    """All measures of one crosscoder on a case's held-out rows; those of interventions only with
    options that name them."""
    options = options or CausalOptions()
    data, pair = case.data, case.pair
    affine_maps = data.affine_maps(crosscoder.cfg.d_a).to(crosscoder.device)
    acts = [rows.acts for rows in data.held_out]
    # With shuffled pairs, a row's token no longer matches B's activation.
    deciles = data.deciles(pair) if case.order_b is None else None
    probes = fit_probes(crosscoder, [rows.acts for rows in data.training])
    contexts = [rows.context for rows in data.held_out]
    found = evaluate(crosscoder, acts, affine_maps, probes, contexts, case.following, deciles)
    metrics = found.metrics | data.metrics | _of_training(crosscoder)
    if options.downstream_pairs > 0:
        means = torch.cat([affine_maps.mean_a, affine_maps.mean_b])
        rows = case.rows_to_splice(options.downstream_pairs)
        metrics |= downstream(crosscoder, pair, rows, means, case.order_b)
        rows = data.held_out_with_text(options.downstream_pairs)
        metrics |= mapped_loss(pair, rows, affine_maps)
    if options.behavior_latents > 0:
        metrics |= _behavior(crosscoder, case, found, affine_maps, options)
    return found._replace(metrics=metrics)


def _of_training(crosscoder: Crosscoder) -> dict[str, float]:
    metadata = crosscoder.cfg.metadata
    counts = {name: getattr(metadata, name) for name in ("pairs_trained", "samples_trained")}
    return {name: count for name, count in counts.items() if count is not None}


def _behavior(
    crosscoder: Crosscoder,
    case: PairTask,
    found: Evaluation,
    affine_maps: AffineMaps,
    options: CausalOptions,
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
    evidence = evidence_in(found)
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
    moved, is_a = directions(crosscoder, affine_maps), evidence_in(found).is_a
    d_a = crosscoder.cfg.d_a
    scaled = {i: moved[i].detach() * found.firing.maxima[i].to(moved) for i in latents}
    return {
        i: Directions(x[:d_a].cpu(), x[d_a:].cpu(), "a" if is_a[i] else "b")
        for i, x in scaled.items()
    }


def evidence_in(found: Evaluation) -> LatentEvidence:
    """The latents' evidence, which `measure` always collects."""
    assert found.evidence is not None
    return found.evidence
