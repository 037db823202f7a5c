import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from sae_lens_dfc.analysis.latents.contrast import N_SAMPLED, ContextMaxima, Contrast, contrast
from tests.analysis.latents.test_streaming_topk import sparse_acts

D_SAE = 9


def corpus(n_contexts: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Activations of contexts of 4 rows; latent 0 never fires, latent 1 always, in a narrow range,
    and 2 at one value."""
    acts = sparse_acts(4 * n_contexts, D_SAE, seed)
    acts = torch.where(acts > 0, acts + shift, acts)
    acts[:, 0] = 0
    acts[:, 1] = 50 + acts[:, 3] / 5 + shift
    acts[:, 2] = (acts[:, 2] > 0).float()
    return acts, torch.arange(n_contexts).repeat_interleave(4)


def counted(
    acts: Tensor, context: Tensor, seed: int = 0, n_sampled: int = N_SAMPLED
) -> ContextMaxima:
    maxima = ContextMaxima(D_SAE, seed, n_sampled)
    numbers = context.unique()
    for chunk in numbers.split(7):
        here = torch.isin(context, chunk)
        maxima.update(acts[here], context[here])
    return maxima


def maxima_of(acts: Tensor, context: Tensor) -> np.ndarray:
    return np.stack([acts[context == c].amax(dim=0).numpy() for c in context.unique()])


def test_d_and_auroc_are_those_of_all_maxima_together() -> None:
    one, other = corpus(60, seed=1, shift=0.05), corpus(90, seed=2)
    found = contrast(counted(*one), counted(*other))
    x, y = (maxima_of(*c).astype(np.float64) for c in (one, other))
    auroc = mannwhitneyu(x, y, axis=0).statistic / (len(x) * len(y))
    np.testing.assert_allclose(found.auroc, auroc, atol=1e-12)
    pooled = np.sqrt((x.var(axis=0, ddof=1) + y.var(axis=0, ddof=1)) / 2)
    d = (x.mean(axis=0) - y.mean(axis=0))[1:] / pooled[1:]
    np.testing.assert_allclose(found.cohens_d[1:], d, rtol=1e-6)
    assert (found.cohens_d[0], found.auroc[0]) == (0, 0.5)
    # All of latent 1 is within a percent of 50, where bins would tell nothing.
    assert auroc[1] > 0.65


@pytest.mark.slow
def test_of_more_contexts_than_are_sampled_the_auroc_is_estimated_without_bias() -> None:
    one, other = corpus(300, seed=3, shift=0.1), corpus(300, seed=4)
    exact = contrast(counted(*one, n_sampled=400), counted(*other, n_sampled=400)).auroc
    drawn = [
        contrast(counted(*one, n_sampled=16, seed=s), counted(*other, n_sampled=16, seed=-s - 1))
        for s in range(40)
    ]
    aurocs = torch.stack([c.auroc for c in drawn])
    error = aurocs.std(dim=0) / 40**0.5
    assert ((aurocs.mean(dim=0) - exact).abs() <= 4 * error + 1e-9).all()
    assert (aurocs.std(dim=0) > 0).any()


def test_latents_that_tell_the_corpora_without_fail_are_ordered_by_d() -> None:
    found = Contrast(torch.tensor([1.0, 9.0, 4.0, 5.0]), torch.tensor([0.9, 0.2, 1.0, 1.0]))
    assert found.order.tolist() == [3, 2, 0, 1]


def test_which_corpus_comes_first_turns_both_round() -> None:
    one, other = counted(*corpus(20, seed=5)), counted(*corpus(30, seed=6))
    here, there = contrast(one, other), contrast(other, one)
    torch.testing.assert_close(here.auroc, 1 - there.auroc)
    torch.testing.assert_close(here.cohens_d, -there.cohens_d)


def test_one_context_is_no_corpus() -> None:
    with pytest.raises(ValueError, match="at least two contexts, got 1"):
        contrast(counted(*corpus(1, seed=0)), counted(*corpus(5, seed=0)))


def test_131072_latents_fit_in_a_quarter_gigabyte_a_corpus() -> None:
    maxima = ContextMaxima(131_072, device="meta")
    kept = (maxima._sums, maxima._firings, maxima._sample.keys, *maxima._sample.values.values())
    assert sum(x.nbytes for x in kept) == 131_072 * (24 + 12 * 128) < 0.25e9
