"""Where every latent fires: its strongest firings and a sample of all, in one pass over text and constant memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.metrics.firings import Best, Firings
from sae_lens_dfc.metrics.sparsity import Firing

PLACE = {"context": torch.int, "segment": torch.int, "activation": torch.float}


class Place(NamedTuple):
    """One firing of a latent."""

    context: int
    """Number of the context in its part of the text."""
    segment: int
    """Number of the segment in the context."""
    activation: float
    quantile: int | None
    """None for the strongest firings; else from which quantile of the latent's activations it was drawn, 0 the weakest."""


@dataclass(frozen=True)
class Gathered:
    """What one pass over text says of every latent."""

    firing: Firing
    strongest: Mapping[str, Tensor]
    """`context`, `segment` and `activation` of each latent's strongest firings, strongest first, each (d_sae, n_contexts);
    activation 0 where there are no more."""
    sampled: Mapping[str, Tensor]
    """The same of a uniform sample of all firings, in random order, each (d_sae, n_sampled)."""

    def places(
        self, latent: int, n_strongest: int = 4, n_quantiles: int = 4, n_per_quantile: int = 1
    ) -> list[Place]:
        """Where a latent fires most, and a random choice from each quantile of its sampled activations.

        The sample, in order of activation, is cut into `n_quantiles` parts of equal size, which are the quantiles of all
        activations as far as the sample tells, and exactly so when it holds all of them. Of one quantile there is one
        firing from a context at most, and none that is among the strongest shown.
        """
        found = [Place(*place, None) for place in _filled(self.strongest, latent)][:n_strongest]
        shown = {(p.context, p.segment) for p in found}
        sample = list(enumerate(_filled(self.sampled, latent)))
        sample.sort(key=lambda drawn: drawn[1][2])
        for q in range(n_quantiles):
            start, stop = (len(sample) * i // n_quantiles for i in (q, q + 1))
            of_quantile: dict[int, Place] = {}
            for _, (context, segment, activation) in sorted(sample[start:stop]):
                if (context, segment) not in shown:
                    of_quantile.setdefault(context, Place(context, segment, activation, q))
            found += list(of_quantile.values())[:n_per_quantile]
        return found


def _filled(places: Mapping[str, Tensor], latent: int) -> list[tuple[int, int, float]]:
    """A latent's places without empty slots."""
    columns = (places[name][latent].tolist() for name in PLACE)
    return [place for place in zip(*columns, strict=True) if place[2] > 0]


class LatentCollector:
    """Every latent's firing rate, activations, strongest firings and a sample of all, in one pass over held-out text.

    Of a firing only its place is kept (context, segment, activation: 20 bytes), so memory is `20 d_sae (n_contexts +
    n_sampled)` bytes whatever the length of the text: 0.2 GB for 131,072 latents. The strongest are one from a context. The sample
    is uniform over all firings of a latent (reservoir sampling by random keys, see `firings.Best`), and quantiles are
    taken of it: exact for latents that fired `n_sampled` times or less.

    Args:
        partition: The crosscoder's.
        n_contexts: Strongest firings of each latent.
        n_sampled: Size of the sample.
        seed: Of the sample.
        device: Where to keep it; that of the activations is fastest.
    """

    def __init__(
        self,
        partition: Partition,
        n_contexts: int = 20,
        n_sampled: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.firing = Firing(partition)
        self.strongest = Best(partition.d_sae, n_contexts, PLACE, device)
        self.sampled = Best(partition.d_sae, n_sampled, PLACE, device)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, rows: PairedRows, feature_acts: Float[Tensor, "n d_sae"]) -> None:
        """Count a batch of whole contexts in.

        Args:
            rows: Where the activations are from.
            feature_acts: The latents' activations there.
        """
        self.firing.update(feature_acts)
        found = Firings.of(feature_acts, rows.context, rows.segment)
        peaks = found.peaks()
        self.strongest.update(peaks.latent, peaks.activation.double(), peaks._asdict())
        keys = torch.rand(len(found.latent), generator=self._generator, dtype=torch.double)
        self.sampled.update(found.latent, keys, found._asdict())

    @property
    def n_bytes(self) -> int:
        """Memory of the places."""
        return self.strongest.n_bytes + self.sampled.n_bytes

    def finish(self) -> Gathered:
        """What was gathered, on the CPU."""
        strongest, sampled = (
            {name: x.cpu() for name, x in best.values.items()}
            for best in (self.strongest, self.sampled)
        )
        return Gathered(self.firing, strongest, sampled)


@torch.no_grad()
def gather(crosscoder: Crosscoder, rows: Iterable[PairedRows]) -> Gathered:
    """One pass of a `LatentCollector` over rows that come with no other use."""
    collector = LatentCollector(crosscoder.partition, device=crosscoder.device)
    for batch in rows:
        collector.update(batch, crosscoder.encode(batch.acts.to(crosscoder.device)))
    return collector.finish()
