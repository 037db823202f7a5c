"""How far the order in which rows are served is from a uniform draw."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def order_measures(
    order: Int[Tensor, " n"], batch_size: int, n_blocks: int = 64
) -> dict[str, float]:
    """Two measures of an order, and what each is for a uniform one.

    `rank_correlation`: Spearman's, of a row's place in the text and its place in the order; 0 ± 1 / sqrt(n - 1)
    when uniform, 1 when nothing is shuffled. `clustering`: the text is cut into `n_blocks` equal stretches; the
    variance of how many rows of a stretch are in a batch, over that of a uniform draw (hypergeometric). 1
    when uniform, above it when neighbours come together; its standard deviation over batches is `clustering_std`.

    Args:
        order: Each row's place in the text, in the order in which rows are served: a permutation of 0 to n - 1.
        batch_size: Rows in a batch; what is left at the end is not looked at.
        n_blocks: Stretches of the text.

    Raises:
        ValueError: It is no permutation, or there are fewer than two batches or fewer rows than stretches.

    >>> measures = order_measures(torch.arange(1000), batch_size=100, n_blocks=10)
    >>> measures["rank_correlation"], round(measures["clustering"])
    (1.0, 111)
    """
    n = len(order)
    if not torch.equal(order.sort().values, torch.arange(n)):
        raise ValueError(f"An order of {n} rows must name each of 0 to {n - 1} once.")
    if n < max(2 * batch_size, n_blocks):
        raise ValueError(
            f"{n} rows are too few for batches of {batch_size} and {n_blocks} stretches."
        )
    batches = order[: n - n % batch_size].view(-1, batch_size)
    blocks = torch.nn.functional.one_hot(batches * n_blocks // n, n_blocks)
    share = torch.bincount(torch.arange(n) * n_blocks // n, minlength=n_blocks).double() / n
    expected = batch_size * share
    variance = expected * (1 - share) * (n - batch_size) / (n - 1)
    ratios = ((blocks.sum(dim=1) - expected).pow(2) / variance).mean(dim=1)
    return {
        "rank_correlation": _spearman(order),
        "rank_correlation_std": 1 / math.sqrt(n - 1),
        "clustering": float(ratios.mean()),
        "clustering_std": float(ratios.std()) / math.sqrt(len(ratios)),
    }


def _spearman(order: Int[Tensor, " n"]) -> float:
    def centred(x: Tensor) -> Float[Tensor, " n"]:
        return x.double() - (len(order) - 1) / 2

    place = centred(torch.arange(len(order)))
    return float((place * centred(order)).sum() / place.pow(2).sum())
