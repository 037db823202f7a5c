import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_lens_dfc.analysis.latents.streaming_topk import ActiveEntries, StreamingTopK

FORMATS = {"context": torch.int, "segment": torch.int, "activation": torch.float}


def sparse_acts(n: int, d_sae: int, seed: int, rate: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(n, d_sae, generator=generator)
    return acts * (torch.rand(n, d_sae, generator=generator) < rate)


def test_firings_are_the_activations_above_zero_where_they_are() -> None:
    acts, context, segment = sparse_acts(50, 7, 0), torch.arange(50) // 5, torch.arange(50) % 5
    found = ActiveEntries.of(acts, context, segment)
    assert len(found.latent) == (acts > 0).sum()
    assert torch.equal(acts[found.context * 5 + found.segment, found.latent], found.activation)


def test_a_peak_is_the_first_largest_of_a_latent_in_a_context() -> None:
    acts = torch.tensor([[1.0, 0.0], [3.0, 0.0], [3.0, 0.0], [2.0, 4.0]])
    peaks = ActiveEntries.of(acts, torch.tensor([5, 5, 5, 6]), torch.tensor([1, 2, 3, 1])).peaks()
    rows = sorted(zip(*(x.tolist() for x in peaks), strict=True))
    assert rows == [(0, 2.0, 6, 1), (0, 3.0, 5, 2), (1, 4.0, 6, 1)]


@pytest.mark.slow
@given(
    st.integers(1, 6),
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12), max_size=6),
)
def test_best_are_those_of_sorting_everything(n: int, batches: list[list[tuple[int, int]]]) -> None:
    best = StreamingTopK(4, n, FORMATS)
    seen: list[tuple[int, int]] = []
    for batch in batches:
        latent, key = torch.tensor(batch, dtype=torch.long).reshape(-1, 2).T
        number = torch.arange(len(seen), len(seen) + len(batch))
        values = {"context": number, "segment": -number, "activation": key.float()}
        best.update(latent, key.double(), values)
        seen += batch
    for latent in range(4):
        # Sorting is stable: of equal keys the first.
        numbers = [i for i, (own, _) in enumerate(seen) if own == latent]
        expected = sorted(numbers, key=lambda i: -seen[i][1])[:n]
        filled = best.is_filled[latent]
        assert int(filled.sum()) == len(expected) and filled[: len(expected)].all()
        assert best.values["context"][latent][filled].tolist() == expected
        assert best.values["segment"][latent][filled].tolist() == [-i for i in expected]
        keys = [float(seen[i][1]) for i in expected]
        assert best.values["activation"][latent][filled].tolist() == keys
    assert best.values["context"][~best.is_filled].eq(0).all()


def test_random_keys_keep_the_beginning_of_a_text_as_often_as_its_end() -> None:
    d_sae, n_kept, n_batches = 500, 8, 100
    best, generator = StreamingTopK(d_sae, n_kept, FORMATS), torch.Generator().manual_seed(0)
    everyone = torch.arange(d_sae)
    for batch in range(n_batches):
        keys = torch.rand(d_sae, generator=generator, dtype=torch.double)
        number = torch.full((d_sae,), batch)
        values = {"context": number, "segment": number, "activation": number.float()}
        best.update(everyone, keys, values)
    tenths = torch.bincount(best.values["context"].flatten() // 10, minlength=10)
    # 4,000 draws, 400 in each tenth: 9 degrees of freedom, of which 33.7 is the 99.99th percentile.
    assert ((tenths - 400.0).pow(2) / 400).sum() < 33.7
    # No firing is kept twice.
    assert all(len(set(kept)) == n_kept for kept in best.values["context"].tolist())


def test_131072_latents_of_20_contexts_and_64_sampled_take_a_fifth_of_a_gigabyte() -> None:
    places = [StreamingTopK(131_072, n, FORMATS, device="meta") for n in (20, 64)]
    n_bytes = sum(x.nbytes for best in places for x in (best.keys, *best.values.values()))
    assert n_bytes == 131_072 * 84 * 20 < 0.25e9
