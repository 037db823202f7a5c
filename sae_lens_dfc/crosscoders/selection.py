"""BatchTopK over the batch of all ranks: one threshold, whoever holds the rows."""

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch import Tensor

from sae_lens_dfc import ranks

# The bits of floats that are not negative are in the floats' order.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    candidates = values[values >= lowest].view(bits)
    while low < high:
        middle = (low + high + 1) // 2
        if int(ranks.total((candidates >= middle).sum())) >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=bits, device=values.device).view(values.dtype)
