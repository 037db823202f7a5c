import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.activations import PairCounts, aligned_contexts, paired_activations
from sae_lens_dfc.alignment import Segment
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import reference_pages


class FakePair(ModelPair):
    """Two 'models' of widths 2 and 1 whose activations are what the test says."""

    def __init__(self, acts: list[Tensor]):
        self._acts = acts

    @property
    def d_a(self) -> int:
        return 2

    def activations(self, contexts: Sequence[Any]) -> list[Tensor]:
        return [self._acts.pop(0) for _ in contexts]


def rows_of(pair: ModelPair, contexts: Any, **kwargs: Any) -> tuple[Tensor, PairCounts]:
    counts = PairCounts()
    rows = list(paired_activations(pair, contexts, counts, **kwargs))
    return torch.cat([r.acts for r in rows]), counts


def segments(n: int) -> list[Segment]:
    return [Segment((i,), (i,)) for i in range(n)]


def test_a_pair_is_left_out_when_either_side_is_an_outlier() -> None:
    acts = torch.ones(7, 3)
    acts[2, :2] = 10  # A's outlier
    acts[4, 2] = 10  # B's outlier
    kept, counts = rows_of(FakePair([acts]), [segments(7)])
    assert torch.equal(kept, torch.ones(4, 3))
    assert (counts.pairs, counts.outlier) == (4, 2)


def test_the_first_position_counts_neither_as_pair_nor_for_the_median() -> None:
    acts = torch.ones(5, 3)
    acts[0] = 1e6
    acts[4] = 1.5
    kept, _ = rows_of(FakePair([acts]), [segments(5)])
    assert len(kept) == 4


def test_without_bos_the_first_pair_is_left_out_by_its_position() -> None:
    # A starts with a BOS token, B has none: B's first token stands at position 0.
    context = [Segment((0,), ()), Segment((1,), (1,)), Segment((2,), (2,))]
    kept, counts = rows_of(FakePair([torch.ones(3, 3)]), [context])
    assert len(kept) == 1
    assert counts.first_position == 1


def test_the_median_remembers_earlier_batches() -> None:
    ones, tens = torch.ones(9, 3), torch.full((3, 3), 10.0)
    kept, counts = rows_of(FakePair([ones, tens]), [segments(9), segments(3)], batch_size_prompts=1)
    assert (len(kept), counts.outlier) == (8, 2)


def test_an_infinite_factor_keeps_every_pair() -> None:
    acts = torch.rand(50, 3) * 100
    kept, counts = rows_of(FakePair([acts]), [segments(50)], outlier_factor=math.inf)
    assert torch.equal(kept, acts[1:]) and counts.outlier == 0


@pytest.mark.parametrize(("column", "which"), [(0, "a"), (2, "b")])
def test_activations_that_are_not_numbers_are_an_error_naming_the_model(
    column: int, which: str
) -> None:
    acts = torch.ones(5, 3)
    acts[3, column] = math.nan
    with pytest.raises(ValueError, match=f"Model {which}'s activations are not all finite"):
        rows_of(FakePair([acts]), [segments(5)])


def test_rows_say_where_they_come_from() -> None:
    acts = torch.arange(8).float()[:, None].expand(8, 3) + 100
    pair = FakePair([acts[:4], acts[4:]])
    (rows,) = paired_activations(pair, [segments(4), segments(4)], PairCounts())
    assert rows.context.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.segment.tolist() == [1, 2, 3, 1, 2, 3]
    assert torch.equal(rows.acts[:, 0], 100 + rows.context * 4 + rows.segment)


def test_contexts_fit_both_models_and_hold_every_pair(pair: ModelPair) -> None:
    counts = PairCounts()
    contexts = list(aligned_contexts(pair, reference_pages()[:3], 32, counts))
    for context in contexts:
        assert context[0] == pair.bos_segment
        assert sum(len(s.ids_a) for s in context) <= 32
        assert sum(len(s.ids_b) for s in context) <= 32
    assert sum(len(c) - 1 for c in contexts) == counts.coverage.pairs
    assert counts.texts == 3


@pytest.mark.parametrize("n", [1, 3, 16])
def test_the_size_of_a_forward_pass_changes_no_activation(pair: ModelPair, n: int) -> None:
    contexts = list(aligned_contexts(pair, reference_pages()[:1], 24, PairCounts()))[:7]
    one, _ = rows_of(pair, contexts, batch_size_prompts=1, outlier_factor=math.inf)
    many, _ = rows_of(pair, contexts, batch_size_prompts=n, outlier_factor=math.inf)
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-4)
