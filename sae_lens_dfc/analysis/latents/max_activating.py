"""Collects max-activating examples and a uniform sample of firings of every latent, in one pass and
constant memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.latents.streaming_topk import ActiveEntries, StreamingTopK
from sae_lens_dfc.analysis.options import N_TOP
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.metrics.sparsity import ActivationStats

PLACE_DTYPES = {"context": torch.int, "segment": torch.int, "activation": torch.float}


class FiringPosition(NamedTuple):
    """One firing of a latent."""

    context: int
    """Index of the context in its part of the text."""
    segment: int
    """Index of the segment in the context."""
    activation: float
    quantile: int | None
    """None for a max-activating example; otherwise the quantile of the latent's activations that it
    was sampled from, 0 being the weakest."""


@dataclass(frozen=True)
class MaxActivatingExamples:
    """Firing statistics and example positions of every latent, from one pass over text."""

    firing: ActivationStats
    strongest: Mapping[str, Tensor]
    """`context`, `segment` and `activation` of each latent's max-activating examples, strongest
    first, each (d_sae, N_TOP); activation 0 in empty slots."""
    sampled: Mapping[str, Tensor]
    """The same for a uniform sample of all firings, in random order, each (d_sae, n_sampled)."""

    def places(
        self, latent: int, n_strongest: int = 4, n_quantiles: int = 4, n_per_quantile: int = 1
    ) -> list[FiringPosition]:
        """A latent's max-activating examples, and random examples from each quantile of its sampled
        activations.

        The sample is sorted by activation and split into `n_quantiles` parts of equal size. These
        estimate the quantiles of all activations, exactly so when the sample holds all firings.
        Each quantile has at most one firing per context, and none that is among the max-activating
        examples shown.
        """
        found = [FiringPosition(*place, None) for place in _filled(self.strongest, latent)][
            :n_strongest
        ]
        shown = {(p.context, p.segment) for p in found}
        sample = list(enumerate(_filled(self.sampled, latent)))
        sample.sort(key=lambda drawn: drawn[1][2])
        for q in range(n_quantiles):
            start, stop = (len(sample) * i // n_quantiles for i in (q, q + 1))
            of_quantile: dict[int, FiringPosition] = {}
            for _, (context, segment, activation) in sorted(sample[start:stop]):
                if (context, segment) not in shown:
                    of_quantile.setdefault(context, FiringPosition(context, segment, activation, q))
            found += list(of_quantile.values())[:n_per_quantile]
        return found

    def random_places(self, latent: int) -> list[FiringPosition]:
        """The sampled firings of a latent, in random order."""
        return [FiringPosition(*place, None) for place in _filled(self.sampled, latent)]


def _filled(places: Mapping[str, Tensor], latent: int) -> list[tuple[int, int, float]]:
    """A latent's filled slots."""
    columns = (places[name][latent].tolist() for name in PLACE_DTYPES)
    return [place for place in zip(*columns, strict=True) if place[2] > 0]


class LatentCollector:
    """Collects every latent's firing rate, activation statistics, max-activating examples and a
    uniform sample of firings, in one pass over held-out text.

    Only the place of a firing is stored (context, segment, activation: 20 bytes), so memory is `20
    d_sae (N_TOP + n_sampled)` bytes regardless of the length of the text: 0.2 GB for 131,072
    latents. Max-activating examples are one per context. The sample is uniform over all firings of
    a latent (reservoir sampling by random keys, see `StreamingTopK`); quantiles computed from it
    are exact for latents that fired at most `n_sampled` times.

    Args:
        partition: The crosscoder's partition.
        n_sampled: Size of the sample.
        seed: Seed of the sample.
        device: Device for storage; that of the activations is fastest.
    """

    def __init__(
        self,
        partition: Partition,
        n_sampled: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.firing = ActivationStats(partition)
        self.strongest = StreamingTopK(partition.d_sae, N_TOP, PLACE_DTYPES, device)
        self.sampled = StreamingTopK(partition.d_sae, n_sampled, PLACE_DTYPES, device)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, rows: PairedRows, feature_acts: Float[Tensor, "n d_sae"]) -> None:
        """Add a batch of whole contexts.

        Args:
            rows: Rows that the activations were computed from.
            feature_acts: The latents' activations on these rows.
        """
        self.firing.update(feature_acts)
        found = ActiveEntries.of(feature_acts, rows.context, rows.segment)
        peaks = found.peaks()
        self.strongest.update(peaks.latent, peaks.activation.double(), peaks._asdict())
        keys = torch.rand(len(found.latent), generator=self._generator, dtype=torch.double)
        self.sampled.update(found.latent, keys, found._asdict())

    def finish(self) -> MaxActivatingExamples:
        """The collected examples, on the CPU."""
        strongest, sampled = (
            {name: x.cpu() for name, x in best.values.items()}
            for best in (self.strongest, self.sampled)
        )
        return MaxActivatingExamples(self.firing, strongest, sampled)


@torch.no_grad()
def collect_max_activating(
    crosscoder: Crosscoder, rows: Iterable[PairedRows]
) -> MaxActivatingExamples:
    """Run a `LatentCollector` over the given rows."""
    collector = LatentCollector(crosscoder.partition, device=crosscoder.device)
    for batch in rows:
        collector.update(batch, crosscoder.encode(batch.acts.to(crosscoder.device)))
    return collector.finish()
