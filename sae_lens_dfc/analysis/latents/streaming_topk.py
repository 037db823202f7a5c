"""Lists a batch's firings, and keeps the top-k firings of every latent in one pass and constant
memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ActiveEntries(NamedTuple):
    """The nonzero activations of a batch, each with its latent and its place in the text."""

    latent: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    context: Int[Tensor, " n"]
    segment: Int[Tensor, " n"]

    @classmethod
    def of(
        cls,
        feature_acts: Float[Tensor, "batch d_sae"],
        context: Int[Tensor, " batch"],
        segment: Int[Tensor, " batch"],
    ) -> "ActiveEntries":
        """The firings of a batch, row by row.

        >>> found = ActiveEntries.of(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([7, 7]), torch.tensor([1, 4]))
        >>> found.latent.tolist(), found.activation.tolist(), found.segment.tolist()
        ([1, 0], [2.0, 3.0], [1, 4])
        """
        row, latent = (feature_acts > 0).nonzero(as_tuple=True)
        context, segment = (x.to(row.device)[row] for x in (context, segment))
        return cls(latent, feature_acts[row, latent].float(), context, segment)

    def take(self, where: Tensor) -> "ActiveEntries":
        """The entries at these indices, or where the mask is true."""
        return ActiveEntries(*(x[where] for x in self))

    def peaks(self) -> "ActiveEntries":
        """The largest activation of each latent in each context; the first one of ties."""
        if len(self.latent) == 0:
            return self
        group = self.latent * (int(self.context.max()) + 1) + self.context
        order = self.activation.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[1:] = group[order][1:] != group[order][:-1]
        return self.take(order[is_first])


@dataclass
class StreamingTopK:
    """Keeps each latent's `n` firings with the largest keys, largest first; ties go to the earlier
    firing.

    With the activation as key it keeps the max-activating examples. With a random key it keeps a
    uniform sample: every set of `n` firings is equally likely, whatever their number and order
    (reservoir sampling by random keys: Efraimidis & Spirakis 2006, "Weighted random sampling with a
    reservoir", all weights equal).

    Memory is `8 + bytes of the values` for each of `d_sae * n` slots, regardless of the number of
    firings.

    Args:
        d_sae: Number of latents.
        n: Slots per latent.
        formats: Values stored with each key: name and dtype.
        device: Device for storage.

    >>> best = StreamingTopK(2, 2, {"activation": torch.float})
    >>> acts = torch.tensor([1.0, 5.0, 3.0, 2.0])
    >>> best.update(torch.tensor([0, 0, 0, 1]), acts.double(), {"activation": acts})
    >>> best.values["activation"].tolist(), best.is_filled.tolist()
    ([[5.0, 3.0], [2.0, 0.0]], [[True, True], [True, False]])
    """

    d_sae: int
    n: int
    formats: Mapping[str, torch.dtype]
    device: torch.device | str = "cpu"
    keys: Float[Tensor, "d_sae n"] = field(init=False)
    """Minus infinity where a slot is empty."""
    values: dict[str, Tensor] = field(init=False)
    """Stored values by name, each of shape (d_sae, n); 0 where a slot is empty."""

    def __post_init__(self) -> None:
        shape = self.d_sae, self.n
        # float64: among millions of float32 random numbers many are equal, and ties would favor
        # early firings.
        self.keys = torch.full(shape, -torch.inf, dtype=torch.double, device=self.device)
        self.values = {
            name: torch.zeros(shape, dtype=kind, device=self.device)
            for name, kind in self.formats.items()
        }

    @property
    def is_filled(self) -> Tensor:
        """Which slots hold a firing, (d_sae, n)."""
        return self.keys > -torch.inf

    def update(
        self, latent: Int[Tensor, " m"], keys: Float[Tensor, " m"], values: Mapping[str, Tensor]
    ) -> None:
        """Add firings.

        Args:
            latent: Latent of each firing.
            keys: Key of each firing, in float64.
            values: Values to store for each firing, by name.
        """
        latent, keys = latent.to(self.device), keys.to(self.device)
        wanted = (keys > self.keys[latent, -1]).nonzero()[:, 0]
        order = wanted[keys[wanted].argsort(descending=True, stable=True)]
        order = order[latent[order].argsort(stable=True)]
        if len(order) == 0:
            return
        touched, row, counts = latent[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(order), device=self.device) - (counts.cumsum(0) - counts)[row]
        row, rank, order = (x[rank < self.n] for x in (row, rank, order))
        width = int(rank.max()) + 1

        def beside(kept: Tensor, fresh: Tensor, empty: float) -> Tensor:
            block = kept.new_full((len(touched), width), empty)
            block[row, rank] = fresh.to(block)[order]
            return torch.cat([kept[touched], block], dim=1)

        # Stored entries come first, so they win ties.
        both, index = beside(self.keys, keys, -torch.inf).sort(dim=1, descending=True, stable=True)
        self.keys[touched] = both[:, : self.n]
        index = index[:, : self.n]
        for name, kept in self.values.items():
            kept[touched] = beside(kept, values[name], 0).gather(1, index)
