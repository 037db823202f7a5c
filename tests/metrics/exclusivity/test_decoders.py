import pytest
import torch
from torch.nn.functional import normalize

from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.metrics.exclusivity.decoders import (
    both_decoder_differences,
    relative_decoder_differences,
    relative_decoder_norms,
)
from sae_lens_dfc.stats.affine_maps import AffineMaps
from tests.helpers import make_dfc


def test_a_latent_of_equal_length_in_two_directions_is_told_from_a_shared_one() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(d_in=4, d_sae=4, d_a=2, d_b=2))
    # The same in both; turned by a right angle; B's alone; B's three times as long.
    crosscoder.W_dec.data = torch.tensor([[3.0, 4, 3, 4], [1, 0, 0, 1], [0, 0, 0, 2], [1, 0, 3, 0]])
    assert both_decoder_differences(crosscoder)[1].tolist() == [[0, 0], [-1, 1], [0, 2], [2, 0]]
    expected = torch.tensor([0, 2**0.5 / 2, 1, 0.5])
    torch.testing.assert_close(relative_decoder_differences(crosscoder), expected)
    assert relative_decoder_norms(crosscoder)[:2].tolist() == [0.5, 0.5]


def test_a_map_moves_directions_and_keeps_their_length_of_training() -> None:
    crosscoder = make_dfc().to_inference().requires_grad_(False)
    crosscoder.input_scale = torch.tensor([2.0, 5.0])
    a, b = crosscoder.partition.models.values()
    shared, shrinking = crosscoder.partition.slices["shared"], torch.randn(5, 7) / 100
    affine_maps = AffineMaps(torch.zeros(5), torch.zeros(7), shrinking, torch.zeros(7, 5))
    moved = normalize(crosscoder.W_dec[:, a] @ shrinking, dim=-1)
    lengths = crosscoder.decoder_norms()[0] / 5
    crosscoder.W_dec[shared, b] = (moved * lengths[:, None])[shared]
    relative = relative_decoder_differences(crosscoder, affine_maps)
    torch.testing.assert_close(
        relative[shared], torch.zeros_like(relative[shared]), atol=1e-5, rtol=0
    )
    for name in ("a_exclusive", "b_exclusive"):
        own = relative[crosscoder.partition.slices[name]]
        torch.testing.assert_close(own, torch.ones_like(own))


def test_directions_of_two_widths_are_not_told_apart_without_a_map() -> None:
    with pytest.raises(ValueError, match="Give `affine_maps`"):
        relative_decoder_differences(make_dfc().to_inference())
