"""The difference between two models' activations, and the directions that hold most of it."""

import torch

from sae_lens_dfc.stats.activation_difference import activation_difference
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.stats.moments import PairMoments


def test_with_maps_the_difference_is_what_the_other_model_is_mapped_to() -> None:
    maps = AffineMaps(
        mean_a=torch.tensor([1.0, 2.0]),
        mean_b=torch.tensor([3.0, 0.0, 1.0]),
        a_to_b=torch.randn(2, 3),
        b_to_a=torch.randn(3, 2),
    )
    acts = torch.randn(50, 5)
    moments = PairMoments.of([acts])
    in_b = activation_difference("b", 2, 3, maps)
    in_a = activation_difference("a", 2, 3, maps)
    torch.testing.assert_close(in_b.of(acts), maps.to_b(acts[:, :2]) - acts[:, 2:])
    torch.testing.assert_close(in_a.of(acts), maps.to_a(acts[:, 2:]) - acts[:, :2])
    torch.testing.assert_close(in_b.mean(moments), in_b.of(acts).mean(dim=0))


def test_components_hold_most_of_the_mean_square() -> None:
    acts = torch.randn(50, 6) + torch.tensor([0.0, 0, 0, 0, 0, 3])
    difference = activation_difference("a", 3, 3, None)
    components = difference.components(PairMoments.of([acts]), 2)
    _, _, directions = torch.linalg.svd(acts[:, 3:] - acts[:, :3], full_matrices=False)
    cosines = (directions[:2] * components.T).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(2))
