"""What natural text says of a run's latents: how strongly they fire, and how the two models map to each other."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.measured_run import LATENTS_FILENAME, latents_column, read_latents
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.metrics.stitching import Stitching, fit_stitching, stitching_quality
from sae_lens_dfc.pair_data import regrouped

logger = logging.getLogger(__name__)

TESTED_EVERY = 5
"""Each so many-th batch of pairs tests the map that is fitted to the others."""


def stored_maxima(folder: str | Path, crosscoder: Crosscoder) -> Float[Tensor, " d_sae"] | None:
    """Each latent's largest activation, as `demo` or `evaluate --output` wrote it into a folder; none where it did not.

    Raises:
        ValueError: What is there is of another crosscoder.
    """
    path = Path(folder) / LATENTS_FILENAME
    if not path.is_file():
        return None
    lines = read_latents(path, crosscoder.cfg.d_sae)
    names = [crosscoder.partition.name_of(i) for i in range(crosscoder.cfg.d_sae)]
    if [line.get("partition") for line in lines] != names:
        raise ValueError(
            f"{path} is not of this crosscoder: it has {len(lines)} latents in other partitions than its "
            f"{len(names)}. Name the folder that `evaluate RUN --output` wrote for this run."
        )
    return latents_column(path, lines, "max_activation")


@torch.no_grad()
def largest_activations(
    crosscoder: Crosscoder, rows: Sequence[PairedRows]
) -> Float[Tensor, " d_sae"]:
    """Each latent's largest activation on these rows; 0 where it does not fire."""
    firing = Firing(crosscoder.partition)
    for batch in rows:
        firing.update(crosscoder.encode(batch.acts.to(crosscoder.device)))
    return firing.maxima


class FittedMap(NamedTuple):
    """Maps between the models, and pairs that they were not fitted to."""

    stitching: Stitching
    others: list[Float[Tensor, "_ d_in"]]


def fitted_map(rows: Sequence[PairedRows], d_a: int) -> FittedMap:
    """Maps fitted to four fifths of the rows, whole contexts; how much they explain of the last fifth is logged.

    Raises:
        ValueError: There are too few contexts to fit to some and test on others.
    """
    batches = [batch.acts for batch in regrouped(rows)]
    if len(batches) < 2:
        raise ValueError(
            "One context is not enough text to fit a map to and test it. Give more (--eval-pairs, --dataset)."
        )
    others = batches[::TESTED_EVERY]
    fitted = PairMoments.of(b for i, b in enumerate(batches) if i % TESTED_EVERY)
    stitching = fit_stitching(fitted, d_a)
    quality = stitching_quality(stitching, PairMoments.of(others))
    logger.info(
        f"Map between the models, fitted to {fitted.n:,} held-out pairs: of others it explains "
        f"{quality['stitching/a_to_b']:.1%} of B's variance from A and {quality['stitching/b_to_a']:.1%} of A's from B"
    )
    return FittedMap(stitching, others)
