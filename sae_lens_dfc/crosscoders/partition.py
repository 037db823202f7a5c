"""Divides the latents into A-exclusive, B-exclusive and shared ones; the only file that knows their
order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, EXCLUSIVE_TO, SHARED
from sae_lens_dfc.models.config import OTHER, ModelName


@dataclass(frozen=True)
class Partition:
    """Sizes of the three partitions of latents, and the weight blocks that each may use.

    Latents are ordered `[a_exclusive | b_exclusive | shared]`, as in the public DFC code. An
    A-exclusive latent reads only model A's activations and writes only model A's reconstruction
    (arXiv 2602.11729, section 2.2 and figure 2). The other two blocks of its weights are
    *forbidden*: they enter no matrix product, so values written there cannot leak.

    Args:
        d_a: Width of model A's activations.
        d_b: Width of model B's activations.
        n_a_exclusive: Number of latents only model A may use.
        n_b_exclusive: Number of latents only model B may use.
        n_shared: Number of latents both models use.

    >>> partition = Partition(d_a=3, d_b=5, n_a_exclusive=1, n_b_exclusive=2, n_shared=7)
    >>> partition.d_sae, partition.slices["b_exclusive"]
    (10, slice(1, 3, None))
    """

    d_a: int
    d_b: int
    n_a_exclusive: int
    n_b_exclusive: int
    n_shared: int

    @classmethod
    def of(
        cls, d_a: int, d_b: int, d_sae: int, n_a_exclusive: int, n_b_exclusive: int
    ) -> "Partition":
        """The partition of `d_sae` latents in which all that are not exclusive are shared.

        Raises:
            ValueError: There are more exclusive latents than `d_sae`, or a size is negative.
        """
        if min(n_a_exclusive, n_b_exclusive) < 0 or n_a_exclusive + n_b_exclusive > d_sae:
            raise ValueError(
                f"d_sae={d_sae} is smaller than its exclusive partitions ({n_a_exclusive} for model A, "
                f"{n_b_exclusive} for model B). Raise d_sae or make the partitions smaller."
            )
        n_shared = d_sae - n_a_exclusive - n_b_exclusive
        return cls(d_a, d_b, n_a_exclusive, n_b_exclusive, n_shared)

    @property
    def d_in(self) -> int:
        return self.d_a + self.d_b

    @property
    def d_sae(self) -> int:
        return self.n_a_exclusive + self.n_b_exclusive + self.n_shared

    @property
    def sizes(self) -> dict[str, int]:
        """Number of latents by partition name, in the order of the latents."""
        return {
            A_EXCLUSIVE: self.n_a_exclusive,
            B_EXCLUSIVE: self.n_b_exclusive,
            SHARED: self.n_shared,
        }

    @property
    def slices(self) -> dict[str, slice]:
        """Each partition's slice of the `d_sae` axis."""
        slices: dict[str, slice] = {}
        start = 0
        for name, size in self.sizes.items():
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @property
    def models(self) -> dict[ModelName, slice]:
        """Each model's slice of the `d_in` axis."""
        return {"a": slice(0, self.d_a), "b": slice(self.d_a, self.d_in)}

    def name_of(self, latent: int) -> str:
        """Name of the partition that holds `latent`."""
        return next(
            name for name, where in self.slices.items() if where.start <= latent < where.stop
        )

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """The allowed, non-empty `(inputs, latents)` blocks of the weights, in latent order."""
        everything = slice(0, self.d_in)
        reads = {A_EXCLUSIVE: self.models["a"], B_EXCLUSIVE: self.models["b"], SHARED: everything}
        for name, latents in self.slices.items():
            if self.sizes[name] > 0:
                yield reads[name], latents

    def forbidden_blocks(self) -> Iterator[tuple[slice, slice]]:
        """The `(inputs, latents)` blocks that must be exactly zero in a saved crosscoder."""
        yield self.models["b"], self.slices[A_EXCLUSIVE]
        yield self.models["a"], self.slices[B_EXCLUSIVE]


def encode_blocks(
    acts: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    partition: Partition,
) -> Float[Tensor, "*batch d_sae"]:
    """`acts @ W_enc` without the forbidden blocks.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=1, n_b_exclusive=0, n_shared=1)
    >>> encode_blocks(torch.tensor([[1.0, 10.0]]), torch.ones(2, 2), partition)
    tensor([[ 1., 11.]])
    """
    return torch.cat(
        [acts[..., inputs] @ W_enc[inputs, latents] for inputs, latents in partition.blocks()],
        dim=-1,
    )


def decode_blocks(
    feature_acts: Float[Tensor, "*batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    partition: Partition,
) -> Float[Tensor, "*batch d_in"]:
    """`feature_acts @ W_dec` without the forbidden blocks.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=1, n_b_exclusive=0, n_shared=1)
    >>> decode_blocks(torch.tensor([[1.0, 10.0]]), torch.ones(2, 2), partition)
    tensor([[11., 10.]])
    """
    per_model = []
    for model, inputs in partition.models.items():
        own = partition.slices[EXCLUSIVE_TO[model]]
        shared = partition.slices[SHARED]
        per_model.append(
            feature_acts[..., shared] @ W_dec[shared, inputs]
            + feature_acts[..., own] @ W_dec[own, inputs]
        )
    return torch.cat(per_model, dim=-1)


def decoder_norms(
    W_dec: Float[Tensor, "d_sae d_in"], partition: Partition
) -> Float[Tensor, "2 d_sae"]:
    """L2 norm of each latent's decoder in model A (row 0) and in model B (row 1); 0 in forbidden
    blocks.

    >>> partition = Partition(d_a=2, d_b=1, n_a_exclusive=1, n_b_exclusive=0, n_shared=1)
    >>> decoder_norms(torch.tensor([[3.0, 4.0, 9.0], [0.0, 1.0, 2.0]]), partition)
    tensor([[5., 1.],
            [0., 2.]])
    """
    norms: list[Tensor] = []
    for model, inputs in partition.models.items():
        other = partition.slices[EXCLUSIVE_TO[OTHER[model]]]
        own = W_dec[:, inputs].norm(dim=-1)
        forbidden = own.new_zeros(other.stop - other.start)
        norms.append(torch.cat([own[: other.start], forbidden, own[other.stop :]]))
    return torch.stack(norms)


@torch.no_grad()
def zero_forbidden_(W_enc: Tensor, W_dec: Tensor, partition: Partition) -> None:
    """Write exact zeros into the forbidden blocks of both weights, in place."""
    for inputs, latents in partition.forbidden_blocks():
        W_enc[inputs, latents] = 0
        W_dec[latents, inputs] = 0


@torch.no_grad()
def max_forbidden_weight(W_enc: Tensor, W_dec: Tensor, partition: Partition) -> float:
    """Largest absolute forbidden weight: 0.0 for a sound crosscoder."""
    forbidden = [
        block.abs().max().item()
        for inputs, latents in partition.forbidden_blocks()
        for block in (W_enc[inputs, latents], W_dec[latents, inputs])
        if block.numel() > 0
    ]
    return max(forbidden, default=0.0)
