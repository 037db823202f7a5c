"""Encodes and decodes with only the latents that fire, forward and backward.

Of a batch's `batch x d_sae` activations only `k x batch` are not zero. Once they are known,
decoding and every gradient are sums of a few rows per row or latent, computed by
`torch.nn.functional.embedding_bag` on CPU and GPU alike. Values and gradients equal those of the
dense definition `relu((x - b_dec) @ W_enc + b_enc) @ W_dec` with zeros outside the selected
entries.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from typing_extensions import override

from sae_lens_dfc.crosscoders.partition import Partition, zero_forbidden_
from sae_lens_dfc.crosscoders.selection import would_wait

# Column blocks of a product start at multiples of this. Unaligned blocks take an eighth longer on a
# CPU, more than multiplying a few latents' zeros.
ALIGNMENT = 64


class SparseIndices(NamedTuple):
    """Indices of the possibly non-zero entries of a sparse `(n_rows, d_sae)` matrix, sorted by row,
    then latent."""

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    row_starts: Int[Tensor, " n_rows"]
    """Number of entries before each row."""
    by_latent: Int[Tensor, " n"]
    """Permutation that sorts the entries by latent, then row."""
    latent_starts: Int[Tensor, " d_sae"]
    """Number of entries before each latent, in that order."""

    @classmethod
    def of(
        cls, rows: Int[Tensor, " n"], latents: Int[Tensor, " n"], n_rows: int, d_sae: int
    ) -> "SparseIndices":
        """Build both orders from entries sorted by row.

        >>> places = SparseIndices.of(torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]), n_rows=2, d_sae=4)
        >>> places.row_starts, places.by_latent, places.latent_starts
        (tensor([0, 2]), tensor([2, 0, 1]), tensor([0, 1, 2, 2]))
        """
        by_latent = latents.argsort(stable=True)
        latent_starts = _starts(latents[by_latent], d_sae)
        return cls(rows, latents, _starts(rows, n_rows), by_latent, latent_starts)


def _starts(numbers: Int[Tensor, " n"], n_groups: int) -> Int[Tensor, " n_groups"]:
    return torch.searchsorted(numbers, torch.arange(n_groups, device=numbers.device))


@torch.no_grad()
def products(
    x: Float[Tensor, "batch d"],
    y: Float[Tensor, "d_sae d"],
    rows: Int[Tensor, " n"],
    latents: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """`x[row] . y[latent]` at each entry, entries sorted by row, without gradients.

    >>> y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> products(torch.eye(2), y, torch.tensor([0, 1]), torch.tensor([2, 0]))
    tensor([5., 2.])
    """
    _hear_that_csr_is_a_beta()
    row_starts = _starts(rows, len(x) + 1)
    size = len(x), len(y)
    zeros = torch.sparse_csr_tensor(
        row_starts, latents, x.new_zeros(len(rows)), size, check_invariants=False
    )
    return torch.sparse.sampled_addmm(zeros, x, y.T, beta=0).values()


def firing_counts(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
    """How often each latent fires in a batch; the activations may be sparse.

    >>> acts = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    >>> firing_counts(acts), firing_counts(acts.to_sparse())
    (tensor([2., 1.]), tensor([2., 1.]))
    """
    if not feature_acts.is_sparse:
        return (feature_acts != 0).sum(dim=0, dtype=torch.float)
    feature_acts = feature_acts.coalesce()
    fires = (feature_acts.values() != 0).float()
    counts = fires.new_zeros(feature_acts.shape[1])
    return counts.index_add_(0, feature_acts.indices()[1], fires)


@lru_cache
def _hear_that_csr_is_a_beta() -> None:
    """Trigger torch's beta warning once per process, suppressed: a filter around each use would not
    be thread-safe."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        torch.eye(1).to_sparse_csr()


class SparseActs(NamedTuple):
    """Latents that fire, sorted by row, then latent, with their pre-activations."""

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    pre: Float[Tensor, " n"]

    def where(self, these: Shaped[Tensor, " m"]) -> "SparseActs":
        """The entries at these indices, or where this mask is true."""
        return SparseActs(self.rows[these], self.latents[these], self.pre[these])

    def among(self, latents: slice) -> "SparseActs":
        """The entries of these latents; on a GPU the others stay, with pre-activation 0."""
        inside = (self.latents >= latents.start) & (self.latents < latents.stop)
        return self._replace(pre=self.pre * inside) if would_wait(inside) else self.where(inside)

    def matrix(
        self, values: Float[Tensor, " n"], size: tuple[int, int]
    ) -> Float[Tensor, "batch d_sae"]:
        """A coalesced sparse matrix with these values at the entries."""
        indices = torch.stack([self.rows, self.latents])
        return torch.sparse_coo_tensor(
            indices, values, size, is_coalesced=True, check_invariants=False
        )

    @classmethod
    def joined(cls, groups: Sequence["SparseActs"], d_sae: int) -> "SparseActs":
        """Merge several groups of entries of the same rows."""
        rows, latents, pre = (torch.cat(parts) for parts in zip(*groups, strict=True))
        return cls(rows, latents, pre).where((rows * d_sae + latents).argsort())


class DenseBlock(NamedTuple):
    """Latents that may fire on any row, with their pre-activations."""

    latents: Int[Tensor, " n"]
    pre: Float[Tensor, "batch n"]


@dataclass(frozen=True)
class PreActivations:
    """Pre-activations of all latents for a whole batch, the only dense product of a step; without
    gradients.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=2)
    >>> pre = PreActivations.of(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(2), partition)
    >>> pre.product, pre.at(torch.tensor([0]), torch.tensor([1])).pre
    (tensor([[2., 3.]]), tensor([3.]))
    """

    product: Float[Tensor, "batch d_sae"]
    """All pre-activations, in bfloat16 if requested."""
    x: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        partition: Partition,
        dtype: torch.dtype | None = None,
    ) -> "PreActivations":
        """`x @ W_enc + b_enc` without the forbidden blocks.

        Args:
            x: Encoder inputs, i.e. activations minus the decoder bias.
            W_enc: Encoder, with zero forbidden blocks.
            b_enc: Encoder bias.
            partition: Defines the forbidden blocks.
            dtype: dtype of the factors and the product; none uses that of `x`. With bfloat16, sums
                accumulate in float32, unless torch allows reduced precision on a GPU, as it does by
                default for split reductions.
        """
        dtype = dtype or x.dtype
        product = x.new_empty(len(x), len(b_enc), dtype=dtype)
        factors = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
        for inputs, latents in _aligned_blocks(partition):
            part = factors[0][:, inputs], factors[1][inputs, latents]
            torch.addmm(factors[2][latents], *part, out=product[:, latents])
        return cls(product, x, W_enc, b_enc)

    @property
    def is_exact(self) -> bool:
        return self.product.dtype == self.x.dtype

    def at(self, rows: Int[Tensor, " n"], latents: Int[Tensor, " n"]) -> SparseActs:
        """Pre-activations at these entries, in the weights' dtype; recomputed if the product has
        lower precision."""
        if self.is_exact:
            return SparseActs(rows, latents, self.product[rows, latents])
        pre = products(self.x, self.W_enc.T, rows, latents) + self.b_enc[latents]
        return SparseActs(rows, latents, pre)

    def of_latents(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        """Pre-activations of these latents on every row, in the weights' dtype; recomputed
        likewise."""
        if self.is_exact:
            return self.product[:, latents]
        return torch.addmm(self.b_enc[latents], self.x, self.W_enc[:, latents])


@lru_cache
def _aligned_blocks(partition: Partition) -> list[tuple[slice, slice]]:
    """The allowed blocks, aligned: strips of latents that span two blocks read all inputs, zeros
    included."""
    everything = slice(0, partition.d_in)
    strips: list[tuple[slice, int]] = []
    for start in range(0, partition.d_sae, ALIGNMENT):
        reads = [
            inputs
            for inputs, latents in partition.blocks()
            if latents.start < start + ALIGNMENT and start < latents.stop
        ]
        strips.append((reads[0] if len(reads) == 1 else everything, start))
    blocks: list[tuple[slice, slice]] = []
    for inputs, run in groupby(strips, key=lambda strip: strip[0]):
        starts = [start for _, start in run]
        blocks.append((inputs, slice(starts[0], min(starts[-1] + ALIGNMENT, partition.d_sae))))
    return blocks


class Weights(NamedTuple):
    """Weights of a crosscoder, with zero forbidden blocks."""

    W_enc: Float[Tensor, "d_in d_sae"]
    """Stored as its transpose, it saves a copy of its gradient."""
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]


def reconstruct(
    acts: Float[Tensor, "batch d_in"],
    weights: Weights,
    choices: Mapping[str, SparseActs | DenseBlock],
    partition: Partition,
) -> dict[str, Float[Tensor, "batch d_in"]]:
    """Reconstruction by each of several sets of latents, without the decoder bias, with gradients.

    Each is `relu((acts - b_dec) @ W_enc + b_enc) @ W_dec` with zeros for the latents not chosen;
    each weight's gradient is written once, for any number of sets.

    Args:
        acts: Normalized activations.
        weights: Encoder and decoder.
        choices: Latents that fire, by name of reconstruction; at least one is `SparseActs`.
        partition: Defines the blocks whose gradient is zero.
    """
    decoded = _Rebuild.apply(acts, *weights, list(choices.values()), partition)
    return dict(zip(choices, decoded, strict=True))


class _Rebuild(Function):
    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004
        W_dec: Tensor,
        b_dec: Tensor,
        choices: list[SparseActs | DenseBlock],
        partition: Partition,
    ) -> tuple[Tensor, ...]:
        chosen = [c for c in choices if isinstance(c, SparseActs)]
        ctx.is_block = [isinstance(c, DenseBlock) for c in choices]
        ctx.blocks = [c for c in choices if isinstance(c, DenseBlock)]
        ctx.partition = partition
        # Stack the sparse choices as rows of one matrix.
        rows = torch.cat([c.rows + i * len(x) for i, c in enumerate(chosen)])
        latents = torch.cat([c.latents for c in chosen])
        values = torch.cat([c.pre for c in chosen]).relu()
        places = SparseIndices.of(rows, latents, len(chosen) * len(x), len(W_dec))
        ctx.places = places
        # Torch's kernel for the values' gradient is reachable only through its own backward pass.
        with torch.enable_grad():
            ctx.values = values.requires_grad_()
            ctx.sums = _weighted_sums(W_dec, latents, places.row_starts, values)
        ctx.save_for_backward(x, W_enc, W_dec, b_dec)
        sparse = iter(ctx.sums.detach().split(len(x)))
        return tuple(
            c.pre.relu() @ W_dec[c.latents] if isinstance(c, DenseBlock) else next(sparse)
            for c in choices
        )

    @override
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, W_dec, b_dec = ctx.saved_tensors
        places: SparseIndices = ctx.places
        is_block, values = ctx.is_block, ctx.values
        centered = x - b_dec
        sparse = torch.cat([g for g, b in zip(grad_outputs, is_block, strict=True) if not b])
        (g,) = torch.autograd.grad(ctx.sums, values, sparse, retain_graph=True)
        g = g * (values > 0)
        for_W_dec = _latents_sums(sparse, values.detach(), places)
        # Transposed, like the memory layout of the weights.
        for_W_enc = _latents_sums(centered, g, places)
        for_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, places.latents, g)
        for_x = None
        if ctx.needs_input_grad[0]:
            by_row = _weighted_sums(W_enc.T, places.latents, places.row_starts, g)
            for_x = by_row.unflatten(0, (-1, len(x))).sum(dim=0)
        dense = [g for g, b in zip(grad_outputs, is_block, strict=True) if b]
        for (latents, pre), grad in zip(ctx.blocks, dense, strict=True):
            acts = pre.relu()
            g = (grad @ W_dec[latents].T) * (acts > 0)
            for_W_dec.index_add_(0, latents, acts.T @ grad)
            for_W_enc.index_add_(0, latents, g.T @ centered)
            for_b_enc.index_add_(0, latents, g.sum(dim=0))
            if for_x is not None:
                for_x += g @ W_enc[:, latents].T
        zero_forbidden_(for_W_enc.T, for_W_dec, ctx.partition)
        # The gradient of x - b_dec summed over rows needs no per-row gradients.
        for_b_dec = -(W_enc @ for_b_enc)
        return for_x, for_W_enc.T, for_b_enc, for_W_dec, for_b_dec, None, None


def _weighted_sums(
    table: Float[Tensor, "m d"],
    index: Int[Tensor, " n"],
    starts: Int[Tensor, " groups"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, "groups d"]:
    return embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


def _latents_sums(
    x: Float[Tensor, "rows d_in"], values: Float[Tensor, " n"], places: SparseIndices
) -> Float[Tensor, "d_sae d_in"]:
    """`matrix.T @ x` for the sparse matrix of these values, with row numbers taken modulo
    `len(x)`."""
    rows = places.rows[places.by_latent] % len(x)
    return _weighted_sums(x, rows, places.latent_starts, values[places.by_latent])
