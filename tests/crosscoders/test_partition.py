import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_dfc import Partition
from sae_lens_dfc.crosscoders.partition import (
    decode_blocks,
    decoder_norms,
    encode_blocks,
    max_forbidden_weight,
    zero_forbidden_,
)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    a, b, shared = (draw(st.integers(0, 4)) for _ in range(3))
    return Partition(
        draw(st.integers(1, 5)), draw(st.integers(1, 5)), a, b, max(shared, a + b == 0)
    )


@given(partitions())
def test_slices_cover_every_latent_once_and_in_order(partition: Partition) -> None:
    latents = [i for s in partition.slices.values() for i in range(s.start, s.stop)]
    assert latents == list(range(partition.d_sae))
    for name, where in partition.slices.items():
        assert {partition.name_of(i) for i in range(where.start, where.stop)} <= {name}


@given(partitions())
def test_blocks_equal_dense_products_with_masked_weights(partition: Partition) -> None:
    W_enc, W_dec = (
        torch.randn(partition.d_in, partition.d_sae),
        torch.randn(partition.d_sae, partition.d_in),
    )
    acts, feature_acts = torch.randn(3, partition.d_in), torch.randn(3, partition.d_sae)
    encoded, decoded = (
        encode_blocks(acts, W_enc, partition),
        decode_blocks(feature_acts, W_dec, partition),
    )
    norms = decoder_norms(W_dec, partition)
    zero_forbidden_(W_enc, W_dec, partition)
    torch.testing.assert_close(encoded, acts @ W_enc)
    torch.testing.assert_close(decoded, feature_acts @ W_dec)
    d_a = partition.d_a
    masked = torch.stack([W_dec[:, :d_a].norm(dim=1), W_dec[:, d_a:].norm(dim=1)])
    torch.testing.assert_close(norms, masked)


def test_leak_finds_a_single_forbidden_weight_in_either_matrix() -> None:
    partition = Partition(d_a=2, d_b=3, n_a_exclusive=1, n_b_exclusive=1, n_shared=2)
    W_enc, W_dec = torch.randn(5, 4), torch.randn(4, 5)
    zero_forbidden_(W_enc, W_dec, partition)
    assert max_forbidden_weight(W_enc, W_dec, partition) == 0
    W_enc[4, 0] = -0.5  # model B's last dimension, A's latent
    assert max_forbidden_weight(W_enc, W_dec, partition) == 0.5
    W_enc[4, 0] = 0
    W_dec[1, 0] = 0.25  # B's latent, model A's first dimension
    assert max_forbidden_weight(W_enc, W_dec, partition) == 0.25


def test_more_exclusive_latents_than_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="d_sae=4 is smaller than its exclusive partitions"):
        Partition.of(d_a=2, d_b=2, d_sae=4, n_a_exclusive=3, n_b_exclusive=2)
