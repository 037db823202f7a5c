"""Where latents fire, and the best few firings of every latent in one pass and constant memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Firings(NamedTuple):
    """Single activations above 0, each with its latent and its place in the text."""

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
    ) -> "Firings":
        """The firings of a batch, row by row.

        >>> found = Firings.of(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([7, 7]), torch.tensor([1, 4]))
        >>> found.latent.tolist(), found.activation.tolist(), found.segment.tolist()
        ([1, 0], [2.0, 3.0], [1, 4])
        """
        row, latent = (feature_acts > 0).nonzero(as_tuple=True)
        context, segment = (x.to(row.device)[row] for x in (context, segment))
        return cls(latent, feature_acts[row, latent].float(), context, segment)

    def take(self, where: Tensor) -> "Firings":
        """Those at these places, or where it is true."""
        return Firings(*(x[where] for x in self))

    def peaks(self) -> "Firings":
        """Of each latent in each context the largest, and of equal ones the first."""
        if len(self.latent) == 0:
            return self
        group = self.latent * (int(self.context.max()) + 1) + self.context
        order = self.activation.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[1:] = group[order][1:] != group[order][:-1]
        return self.take(order[is_first])


@dataclass
class Best:
    """Of each latent's firings the `n` with the largest keys, largest first; of equal keys the first that came.

    With the activation as its key it keeps the strongest. With a random number as its key it keeps a sample in which every
    set of `n` firings is as likely as any other, however many there are and in whatever order they come (reservoir
    sampling by random keys: Efraimidis & Spirakis 2006, "Weighted random sampling with a reservoir", all weights equal).

    It takes `8 + bytes of the values` for each of `d_sae * n` slots, whatever it has seen.

    Args:
        d_sae: Number of latents.
        n: Slots of each.
        formats: What to keep with a key: each value's name and number format.
        device: Where to keep it.

    >>> best = Best(2, 2, {"activation": torch.float})
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
    """By name, each of shape (d_sae, n); 0 where a slot is empty."""

    def __post_init__(self) -> None:
        shape = self.d_sae, self.n
        # Of float32's random numbers many are equal among millions, and the first would be kept too often.
        self.keys = torch.full(shape, -torch.inf, dtype=torch.double, device=self.device)
        self.values = {
            name: torch.zeros(shape, dtype=kind, device=self.device)
            for name, kind in self.formats.items()
        }

    @property
    def is_filled(self) -> Tensor:
        """Which slots hold a firing, (d_sae, n)."""
        return self.keys > -torch.inf

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return sum(x.nbytes for x in (self.keys, *self.values.values()))

    def update(
        self, latent: Int[Tensor, " m"], keys: Float[Tensor, " m"], values: Mapping[str, Tensor]
    ) -> None:
        """Count firings in.

        Args:
            latent: Whose they are.
            keys: Their keys, in float64.
            values: What to keep of each, by name.
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

        # What is kept stands first, and so it stays where keys are equal.
        both, index = beside(self.keys, keys, -torch.inf).sort(dim=1, descending=True, stable=True)
        self.keys[touched] = both[:, : self.n]
        index = index[:, : self.n]
        for name, kept in self.values.items():
            kept[touched] = beside(kept, values[name], 0).gather(1, index)
