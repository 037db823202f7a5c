import pytest
import torch

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.metrics.stability import stability
from tests.helpers import make_dfc


def small() -> Crosscoder:
    """Six latents of A, four of B, fourteen shared."""
    return make_dfc().to_inference()


def reordered(crosscoder: Crosscoder, order: list[int]) -> Crosscoder:
    other = small()
    with torch.no_grad():
        other.W_dec.copy_(crosscoder.W_dec[order])
    return other


def test_the_order_within_a_partition_does_not_matter() -> None:
    one = small()
    order = [*reversed(range(6)), *reversed(range(6, 10)), *reversed(range(10, 24))]
    result = stability(one, reordered(one, order))
    for name in ("a_exclusive", "b_exclusive", "shared"):
        assert result[f"stability/matched/{name}"] == result[f"stability/agreement/{name}"] == 1


def test_a_latent_found_in_another_partition_is_matched_and_disagrees() -> None:
    one, other = small(), small()
    with torch.no_grad():
        other.W_dec.copy_(one.W_dec)
        # A's latent 0 is latent 10 of the other: shared, with a decoder in B beside the one in A.
        other.W_dec[0, :5] = -one.W_dec[0, :5]
        other.W_dec[10, :5] = one.W_dec[0, :5]
    result = stability(one, other)
    assert result["stability/matched/a_exclusive"] == 1
    assert result["stability/agreement/a_exclusive"] == pytest.approx(5 / 6)
    assert result["stability/matched/shared"] == pytest.approx(13 / 14)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("model", [slice(0, 5), slice(5, 12)])
def test_both_models_must_agree_on_a_shared_latent(model: slice) -> None:
    one, other = small(), small()
    with torch.no_grad():
        other.W_dec.copy_(one.W_dec)
        other.W_dec[10:, model] *= -1
    assert stability(one, other)["stability/matched/shared"] == 0


def test_unrelated_crosscoders_of_many_dimensions_match_nothing() -> None:
    one, other = (
        make_dfc(d_a=60, d_b=60, d_sae=200, a_exclusive_fraction=0.1).to_inference()
        for _ in range(2)
    )
    result = stability(one, other)
    assert result["stability/matched/a_exclusive"] == result["stability/matched/shared"] == 0
    assert "stability/agreement/shared" not in result


def test_chance_is_what_partitions_dealt_out_by_lot_would_agree() -> None:
    # One decoder for all: latent i is latent i of the other, and the other's partitions are dealt
    # out anew.
    torch.manual_seed(0)
    n = 2000
    one = make_dfc(d_a=40, d_b=40, d_sae=n, a_exclusive_fraction=0.25, b_exclusive_fraction=0.25)
    saved, other = one.to_inference(), one.to_inference()
    both = torch.nn.functional.normalize(torch.randn(n, 40), dim=1).repeat(1, 2)
    dealt = torch.randperm(n)
    with torch.no_grad():
        saved.W_dec.copy_(both)
        other.W_dec.copy_(both[dealt])
    result = stability(saved, other)
    for name in ("a_exclusive", "b_exclusive", "shared"):
        agreement, chance = (result[f"stability/{what}/{name}"] for what in ("agreement", "chance"))
        assert agreement == pytest.approx(chance, abs=0.05)


def test_crosscoders_of_other_models_are_refused() -> None:
    one, other = small(), small()
    for crosscoder, hook in (
        (one, "blocks.1.hook_resid_post"),
        (other, "blocks.2.hook_resid_post"),
    ):
        crosscoder.cfg.metadata.model_a = {"model_name": "x", "hook_name": hook}
    with pytest.raises(ValueError, match="of different models: model_a is .*blocks.1"):
        stability(one, other)


def test_crosscoders_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths 5 \+ 7 and 6 \+ 6 have no common"):
        stability(small(), make_dfc(d_a=6, d_b=6).to_inference())
