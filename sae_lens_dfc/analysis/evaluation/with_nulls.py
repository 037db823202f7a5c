"""Evaluates a crosscoder beside its baselines and nulls, and writes the results."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from sae_lens_dfc.analysis.evaluation.baselines import baseline_metrics, prefixed
from sae_lens_dfc.analysis.evaluation.measure import (
    CausalOptions,
    evidence_in,
    measure,
    train_crosscoder,
)
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.report.build import report_data
from sae_lens_dfc.analysis.report.results import Measured, drop_nonfinite, write_results
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import Evaluation
from sae_lens_dfc.metrics.exclusivity.beyond_null import NULLS, beyond_null
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)


@dataclass
class Comparisons:
    """What a crosscoder is compared with."""

    nulls: list[str] = field(default_factory=lambda: ["self", "shuffle"])
    """Nulls to train on and measure: self, shuffle, seed."""
    seed_model: ModelConfig | None = None
    """Model for the `seed` null."""
    baselines: bool = False
    """Whether to train and measure a BatchTopK crosscoder, and to measure PCA."""


class FullEvaluation(NamedTuple):
    """Measures of a crosscoder, its baselines and its nulls."""

    metrics: dict[str, float]
    """All measures; those of a baseline under `baseline/NAME/`, of a null under `null/NAME/`, and
    the share of the crosscoder's candidates beyond the null's 95th percentile under
    `beyond_null/NAME/`."""
    run: Evaluation
    """The crosscoder's own."""


def evaluate_with_nulls(
    crosscoder: Crosscoder,
    case: PairTask,
    compared: Comparisons,
    causal: CausalOptions | None = None,
) -> FullEvaluation:
    """Measure a crosscoder, and train and measure its baselines and one like it on each null.

    Args:
        crosscoder: The trained crosscoder.
        case: The models it was trained on, with their activations. The last null is built from its
            training rows in place, so they are gone afterwards.
        compared: Baselines and nulls.
        causal: Measures to take by intervening on the models; none by default.

    Raises:
        ValueError: A null is unknown, or its model is missing or does not fit.
    """
    logger.info("Measuring the run")
    run = measure(crosscoder, case, causal)
    metrics = dict(run.metrics)
    if compared.baselines:
        metrics |= baseline_metrics(crosscoder, run, case)
    for i, name in enumerate(compared.nulls, start=1):
        logger.info("Null %s (%s): training a crosscoder like it", name, NULLS[name])
        # Two copies of the training rows take half a gigabyte more in the demo.
        null = null_case(name, case, compared.seed_model, in_place=i == len(compared.nulls))
        trained = train_crosscoder(null)
        logger.info("Null %s: measuring", name)
        found = measure(trained, null, causal)
        del null  # free its rows before the next null is built
        of_null = beyond_null(name, evidence_in(run), evidence_in(found))
        metrics |= prefixed(f"null/{name}/", found.metrics)
        metrics |= prefixed(f"beyond_null/{name}/", of_null)
    return FullEvaluation(drop_nonfinite(metrics), run)


def write_evaluation(
    folder: Path,
    crosscoder: Crosscoder,
    found: FullEvaluation,
    case: PairTask,
    cfg: CrosscoderRunnerConfig,
) -> None:
    """Write metrics.json, latents.csv and report.html, which shows the settings `cfg`."""
    measured = Measured.on(crosscoder, found.run, case.data)
    page = report_data(measured, case.data, case.pair, cfg)
    write_results(folder, replace(page, metrics=found.metrics), measured)
