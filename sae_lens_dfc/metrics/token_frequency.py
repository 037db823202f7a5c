"""Computes explained variance by token-frequency decile."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.data.activations import after_first_position
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.stats.jackknife import ROUNDING, Jackknife, Sums

N_DECILES = 10


def paired_tokens(contexts: Iterable[Segments]) -> dict[str, Int[Tensor, " n"]]:
    """Each model's tokens (`a`, `b`) at the paired positions of these contexts, except position 0.

    No model is run, so outliers are included.
    """
    tokens: dict[str, list[Tensor]] = {"a": [], "b": []}
    for context in contexts:
        later = after_first_position(context)
        tokens["a"].append(torch.from_numpy(context.ids_a[context.last_a])[later])
        tokens["b"].append(torch.from_numpy(context.ids_b[context.last_b])[later])
    return {model: torch.cat(t) if t else torch.zeros(0).long() for model, t in tokens.items()}


def token_deciles(tokens: Int[Tensor, " n"], d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """Decile of each vocabulary entry by its frequency in `tokens`; 0 is the rarest, 9 the most
    frequent.

    Tokens are sorted by count, and a token's decile is the one that contains its middle row. So all
    rows of a token are in one decile, and deciles are as equal in rows as that allows: a token that
    makes up more than a tenth of the text makes neighboring deciles smaller or empty. Ties are
    sorted by token id, highest first, since most vocabularies are roughly numbered from frequent to
    rare.

    Args:
        tokens: One model's token at each evaluated row, or at a sample of such rows.
        d_vocab: Size of that model's vocabulary.

    >>> token_deciles(torch.tensor([3, 3, 3, 3, 3, 1, 1, 1, 0, 2]), d_vocab=5)
    tensor([1, 3, 0, 7, 0])
    """
    counts = torch.bincount(tokens.cpu(), minlength=d_vocab)
    order = counts.flip(0).argsort(stable=True)
    in_order = counts.flip(0)[order]
    middle = in_order.cumsum(0) - in_order.double() / 2
    deciles = torch.zeros(d_vocab, dtype=torch.long)
    deciles[d_vocab - 1 - order] = (middle * N_DECILES / max(1, len(tokens))).long()
    return deciles


@dataclass
class ExplainedVarianceByFrequency:
    """Explained variance of each model over the rows of each token-frequency decile.

    `1 - sum |x - reconstruction|^2 / sum |x - mean|^2` over a decile's rows, with the mean over all
    rows. Around its own mean, a decile of few tokens would hardly vary, and its difference from the
    other deciles would be ignored.

    Args:
        partition: Which columns belong to which model.
        center: Approximate mean of the raw activations, around which sums of squares do not cancel.

    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=1)
    >>> metric = ExplainedVarianceByFrequency(partition, center=torch.zeros(2))
    >>> acts, half = torch.tensor([[4.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 2.0], [1.0, 0.0]])
    >>> metric.update(acts, half, {"a": torch.tensor([0, 9]), "b": torch.tensor([9, 9])})
    >>> metric.compute()
    {'explained_variance/a/token_decile_0': 1.0, 'explained_variance/a/token_decile_9': 0.75, 'explained_variance/b/token_decile_9': 0.5}
    """

    partition: Partition
    center: Float[Tensor, " d_in"]
    _sums: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        self._sums = Jackknife(self._measures)

    def update(
        self,
        acts: Float[Tensor, "batch d_in"],
        reconstruction: Float[Tensor, "batch d_in"],
        deciles: Mapping[str, Int[Tensor, " batch"]],
    ) -> None:
        """Add a batch.

        Args:
            acts: Raw activations.
            reconstruction: Their reconstruction.
            deciles: For each model (`a`, `b`) each row's decile: `token_deciles(…)[tokens]`.
        """
        if len(acts) == 0:
            return
        x = acts.double() - self.center.to(acts.device).double()
        squared_error = (acts.double() - reconstruction).pow(2)
        sums: dict[str, Tensor] = {}
        for model, inputs in self.partition.models.items():
            index = deciles[model].to(acts.device)
            ones = x.new_ones(len(x))
            sums[f"n/{model}"] = _by_decile(ones, index)
            sums[f"x/{model}"] = _by_decile(x[:, inputs], index)
            sums[f"xx/{model}"] = _by_decile(x[:, inputs].pow(2).sum(dim=-1), index)
            sums[f"error/{model}"] = _by_decile(squared_error[:, inputs].sum(dim=-1), index)
        self._sums.update(sums)

    def compute(self) -> dict[str, float]:
        """`explained_variance/m/token_decile_0` (rarest) to `…_9`, with standard errors, `/se`. A
        decile without rows or without variance has no key.

        A decile whose rows all lie in one block of the text has no `/se`.

        Raises:
            ValueError: No batch was added.
        """
        return {name: x for name, x in self._sums.compute().items() if not math.isnan(x)}

    def _measures(self, sums: Sums) -> dict[str, float]:
        result: dict[str, float] = {}
        for model in self.partition.models:
            n, x, xx = (sums[f"{name}/{model}"] for name in ("n", "x", "xx"))
            mean = x.sum(dim=0) / n.sum()
            around_mean = xx - 2 * x @ mean + n * mean.pow(2).sum()
            explained = 1 - sums[f"error/{model}"] / around_mean
            known = (n > 0) & (around_mean > ROUNDING * xx)
            for i, value in enumerate(torch.where(known, explained, torch.nan).tolist()):
                result[f"explained_variance/{model}/token_decile_{i}"] = value
        return result


def _by_decile(values: Tensor, deciles: Int[Tensor, " n"]) -> Tensor:
    """Sum rows `(n, *)` by decile, to `(10, *)`."""
    return values.new_zeros(N_DECILES, *values.shape[1:]).index_add_(0, deciles, values)
