"""BatchTopK over the batch of all ranks: one threshold, whoever holds the rows."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch import Tensor

from sae_lens_dfc import ranks

# The bits of floats that are not negative are in the floats' order.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# A threshold is guessed from one score in 63, and lowered until enough scores pass.
ROW_STRIDE, LATENT_STRIDE = 7, 9
MARGINS = (1.2, 2.0)


def keep_largest(
    scores: Float[Tensor, "*batch latents"], k: float
) -> Float[Tensor, "*batch latents"]:
    """The `k` largest positive scores for each row, on average over all ranks' rows; zeros for the others.

    Every rank has the same number of rows. In one process it is SAELens' BatchTopK. Among several, of
    scores that are equal to the last bit at the threshold the first ranks' are kept.

    >>> keep_largest(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), k=1)
    tensor([[3., 0.],
            [0., 2.]])
    """
    if ranks.world_size() == 1:
        return BatchTopK(k)(scores)
    acts = scores.relu()
    n_kept = int(k * (ranks.world_size() * acts.shape[:-1].numel()))
    kept = among_largest(acts.detach().flatten(), n_kept).reshape(acts.shape)
    return torch.where(kept, acts, torch.zeros_like(acts))


def would_wait(x: Shaped[Tensor, "*shape"]) -> bool:
    """Whether Python, to learn a number or a shape that depends on `x`, would wait until a GPU is done."""
    return x.is_cuda


def candidates(
    pre: Float[Tensor, "batch latents"], norms: Float[Tensor, " latents"], n: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows and latents, in order, of the `n` largest positive `pre * norms`, and of some others.

    To sort all scores costs as much as the product that they come from; to compare them once with a
    threshold a fiftieth. On a GPU, where the number of those that pass would have to be waited for,
    they are exactly `n`, and may hold scores that are not positive.

    >>> candidates(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.ones(2), n=2)
    (tensor([0, 1, 1]), tensor([0, 0, 1]))
    """
    if n == 0:
        nowhere = torch.empty(0, dtype=torch.long, device=pre.device)
        return nowhere, nowhere
    # Several ranks wait for one another as it is, and one may have to look at more than its share.
    if would_wait(pre) and ranks.world_size() == 1:
        # Of one long row TopK is radix selection there, and takes no longer than a few comparisons.
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
    if ranks.world_size() == 1:
        return passed
    # What one rank must look at all must: the largest of all may be above the lowest threshold only.
    return _passed(pre, norms, ranks.smallest(threshold))


def _threshold(pre: Tensor, norms: Tensor, n: float) -> Float[Tensor, ""]:
    """About the `n`-th largest score, and at least 0."""
    sample = (pre[::ROW_STRIDE, ::LATENT_STRIDE] * norms[::LATENT_STRIDE]).flatten()
    # What is not a number is found without a threshold that is none.
    sample = sample.nan_to_num(nan=torch.inf)
    k = min(math.ceil(n * len(sample) / pre.numel()), len(sample))
    return sample.topk(k, sorted=False).values.min().relu()


def _passed(pre: Tensor, norms: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    # What is not a number passes, as it would be the largest of a sort.
    passed = torch.le(pre, (threshold / norms).to(pre.dtype)).logical_not_().contiguous()
    flat = _true(passed.view(-1))
    return flat // pre.shape[1], flat % pre.shape[1]


def _true(mask: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Where a mask is true, of which most is false."""
    if len(mask) % 8 != 0:
        return mask.nonzero()[:, 0]
    # Eight at a time as one number: the search is of an eighth of them.
    eights = mask.view(torch.int64).nonzero()[:, 0]
    inside = mask.view(-1, 8)[eights].nonzero()
    return eights[inside[:, 0]] * 8 + inside[:, 1]


def largest(values: Float[Tensor, " n"], n_kept: int) -> Int[Tensor, " kept"]:
    """Indices, in order, of the values that are among the `n_kept` largest of all ranks', zeros aside.

    >>> largest(torch.tensor([5.0, 1.0, 0.0, 7.0]), 2)
    tensor([0, 3])
    """
    if ranks.world_size() == 1:
        kept = values.topk(min(n_kept, len(values)), sorted=False).indices
        return kept.sort().values
    at_least = -(-n_kept // ranks.world_size())
    padded = torch.cat([values, values.new_zeros(max(0, at_least - len(values)))])
    return among_largest(padded, n_kept)[: len(values)].nonzero()[:, 0]


def among_largest(values: Float[Tensor, " n"], n_kept: int) -> Bool[Tensor, " n"]:
    """Which values, none negative, are among the `n_kept` largest of all ranks'; zeros need not be marked.

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
    counts = ranks.gathered(torch.stack([kept.sum(), kept.new_tensor(len(tied), dtype=torch.long)]))
    n_above, n_tied_before = counts[:, 0].sum(), counts[: ranks.rank(), 1].sum()
    kept[tied[: max(0, int(n_kept - n_above - n_tied_before))]] = True
    return kept


def kth_largest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest of all ranks' values, exactly; none is negative, and each rank has as many.

    Were all ranks alike, each would hold `k / ranks` of the largest: the smallest of those that a rank
    finds so bounds the answer from below, and the largest of them from above. Between the two, halving
    the interval of bit patterns takes at most one sum over ranks for each bit. So a step
    moves hundreds of bytes however many ranks there are; gathering candidates would move `k` floats of each.

    >>> kth_largest(torch.tensor([5.0, 1.0, 5.0, 7.0]), 3)
    tensor(5.)
    """
    own = values.topk(-(-k // ranks.world_size()), sorted=False).values.min()
    bits = BITS[values.element_size()]
    lowest = ranks.smallest(own)
    low, high = (int(bound.view(bits)) for bound in (lowest, ranks.largest(own)))
    possible = values[values >= lowest].view(bits)
    while low < high:
        middle = (low + high + 1) // 2
        if int(ranks.total((possible >= middle).sum())) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=bits, device=values.device).view(values.dtype)
