"""BatchTopK selection over the batch of all ranks, with one threshold."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch import Tensor

from sae_lens_dfc.core import distributed

# Bit patterns of non-negative floats sort like the floats.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The threshold is estimated from one score in 63 and lowered until enough scores pass.
ROW_STRIDE, LATENT_STRIDE = 7, 9
MARGINS = (1.2, 2.0)


def keep_largest(
    scores: Float[Tensor, "*batch latents"], k: float
) -> Float[Tensor, "*batch latents"]:
    """Keep the `k` largest positive scores per row, on average over the rows of all ranks, and set
    the others to 0.

    Every rank has the same number of rows. In one process this is SAELens' BatchTopK. With several
    ranks, ties at the threshold are kept from the lowest ranks first.

    >>> keep_largest(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), k=1)
    tensor([[3., 0.],
            [0., 2.]])
    """
    if distributed.world_size() == 1:
        return BatchTopK(k)(scores)
    acts = scores.relu()
    n_kept = int(k * (distributed.world_size() * acts.shape[:-1].numel()))
    kept = among_largest(acts.detach().flatten(), n_kept).reshape(acts.shape)
    return torch.where(kept, acts, torch.zeros_like(acts))


def would_wait(x: Shaped[Tensor, "*shape"]) -> bool:
    """Whether reading a value or shape that depends on `x` would synchronize a GPU."""
    return x.is_cuda


def topk_candidates(
    pre: Float[Tensor, "batch latents"], norms: Float[Tensor, " latents"], n: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows and latents, sorted, that contain the `n` largest positive `pre * norms`, and possibly
    others.

    Sorting all scores costs as much as the matrix product that computes them; comparing them with a
    threshold costs a fiftieth. On a GPU, where counting those that pass would synchronize, exactly
    `n` are returned, which may include scores that are not positive.

    >>> topk_candidates(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.ones(2), n=2)
    (tensor([0, 1, 1]), tensor([0, 0, 1]))
    """
    if n == 0:
        nowhere = torch.empty(0, dtype=torch.long, device=pre.device)
        return nowhere, nowhere
    # Several ranks synchronize anyway, and one rank may need more than its share.
    if would_wait(pre) and distributed.world_size() == 1:
        # On a GPU, topk of one long row is a radix selection, as fast as a few comparisons.
        flat = (pre * norms.to(pre.dtype)).flatten().topk(n, sorted=False).indices.sort().values
        return flat // pre.shape[1], flat % pre.shape[1]
    for margin in MARGINS:
        threshold = _threshold(pre, norms, n * margin)
        passed = _passed(pre, norms, threshold)
        if len(passed[0]) >= n:
            break
    else:
        threshold = norms.new_zeros(())
        passed = _passed(pre, norms, threshold)
    if distributed.world_size() == 1:
        return passed
    # All ranks use the lowest threshold, since the largest scores of all may exceed only that one.
    return _passed(pre, norms, distributed.all_reduce_min(threshold))


def _threshold(pre: Tensor, norms: Tensor, n: float) -> Float[Tensor, ""]:
    """Estimate of the `n`-th largest score, at least 0."""
    sample = (pre[::ROW_STRIDE, ::LATENT_STRIDE] * norms[::LATENT_STRIDE]).flatten()
    # NaN scores pass any threshold, and the threshold itself must not be NaN.
    sample = sample.nan_to_num(nan=torch.inf)
    k = min(math.ceil(n * len(sample) / pre.numel()), len(sample))
    return sample.topk(k, sorted=False).values.min().relu()


def _passed(pre: Tensor, norms: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    # NaN passes, as it would sort as the largest.
    passed = torch.le(pre, (threshold / norms).to(pre.dtype)).logical_not_().contiguous()
    flat = _true(passed.view(-1))
    return flat // pre.shape[1], flat % pre.shape[1]


def _true(mask: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Indices where a mostly false mask is true."""
    if len(mask) % 8 != 0:
        return mask.nonzero()[:, 0]
    # Read eight bools as one int64, which shortens the search eightfold.
    eights = mask.view(torch.int64).nonzero()[:, 0]
    inside = mask.view(-1, 8)[eights].nonzero()
    return eights[inside[:, 0]] * 8 + inside[:, 1]


def largest(values: Float[Tensor, " n"], n_kept: int) -> Int[Tensor, " kept"]:
    """Sorted indices of the values that are among the `n_kept` largest of all ranks; zeros may be
    left out.

    >>> largest(torch.tensor([5.0, 1.0, 0.0, 7.0]), 2)
    tensor([0, 3])
    """
    if distributed.world_size() == 1:
        kept = values.topk(min(n_kept, len(values)), sorted=False).indices
        return kept.sort().values
    at_least = -(-n_kept // distributed.world_size())
    padded = torch.cat([values, values.new_zeros(max(0, at_least - len(values)))])
    return among_largest(padded, n_kept)[: len(values)].nonzero()[:, 0]


def among_largest(values: Float[Tensor, " n"], n_kept: int) -> Bool[Tensor, " n"]:
    """Mask of the values, all non-negative, that are among the `n_kept` largest of all ranks; zeros
    may be left out.

    >>> among_largest(torch.tensor([5.0, 1.0, 5.0, 7.0]), 2)
    tensor([ True, False, False,  True])
    """
    if n_kept == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = kth_largest(values, n_kept)
    kept = values > least
    if least == 0:
        return kept
    tied = (values == least).nonzero()[:, 0]
    counts = distributed.all_gather(
        torch.stack([kept.sum(), kept.new_tensor(len(tied), dtype=torch.long)])
    )
    n_above, n_tied_before = counts[:, 0].sum(), counts[: distributed.rank(), 1].sum()
    kept[tied[: max(0, int(n_kept - n_above - n_tied_before))]] = True
    return kept


def kth_largest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The exact k-th largest value over all ranks; values are non-negative, and each rank has
    equally many.

    Each rank takes its own `k / ranks`-th largest value. The smallest of these bounds the answer
    from below, the largest from above. Between the two, bisecting the bit patterns takes at most
    one all-reduce per bit. A step therefore moves hundreds of bytes for any number of ranks;
    gathering candidates would move `k` floats from each.

    >>> kth_largest(torch.tensor([5.0, 1.0, 5.0, 7.0]), 3)
    tensor(5.)
    """
    own = values.topk(-(-k // distributed.world_size()), sorted=False).values.min()
    bits = BITS[values.element_size()]
    lowest = distributed.all_reduce_min(own)
    low, high = (int(bound.view(bits)) for bound in (lowest, distributed.all_reduce_max(own)))
    possible = values[values >= lowest].view(bits)
    while low < high:
        middle = (low + high + 1) // 2
        if int(distributed.all_reduce_sum((possible >= middle).sum())) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=bits, device=values.device).view(values.dtype)
