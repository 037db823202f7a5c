import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.data.activations import origins, paired_activations
from sae_lens_dfc.data.alignment.segments import Segment
from sae_lens_dfc.data.contexts import PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from tests.helpers import batches_of, stream_of


class FakePair(ModelPair):
    """Two 'models' of widths 2 and 1 whose activations are what the test says."""

    def __init__(self, acts: list[Tensor]):
        self._acts = acts
        models = [SimpleNamespace(name=name, model=torch.nn.Linear(1, 1)) for name in ("x", "y")]
        self.a, self.b = models  # type: ignore[assignment]

    @property
    def d_a(self) -> int:
        return 2

    def activations(self, contexts: Sequence[Any]) -> list[Tensor]:
        return [self._acts.pop(0) for _ in contexts]


def rows_of(
    pair: ModelPair, contexts: Any, size: int = 16, **kwargs: Any
) -> tuple[Tensor, PairCounts]:
    counts = PairCounts()
    rows = list(paired_activations(pair, batches_of(contexts, size), counts, **kwargs))
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
    kept, counts = rows_of(FakePair([ones, tens]), [segments(9), segments(3)], size=1)
    assert (len(kept), counts.outlier) == (8, 2)


def test_an_infinite_factor_keeps_every_pair() -> None:
    acts = torch.rand(50, 3) * 100
    kept, counts = rows_of(FakePair([acts]), [segments(50)], outlier_factor=math.inf)
    assert torch.equal(kept, acts[1:]) and counts.outlier == 0


@pytest.mark.parametrize("column", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pair_that_is_not_finite_is_left_out_and_counted(column: int, bad: float) -> None:
    acts = torch.ones(203, 3)
    acts[3, column] = bad
    kept, counts = rows_of(FakePair([acts]), [segments(203)])
    assert torch.equal(kept, torch.ones(201, 3))
    assert (counts.pairs, counts.not_finite, counts.outlier) == (201, 1, 0)


def test_more_than_one_percent_that_is_not_finite_is_an_error() -> None:
    acts = torch.ones(101, 3)
    acts[3:5] = math.nan
    with pytest.raises(ValueError, match="2 of 100 pairs of activations hold NaN or infinity"):
        rows_of(FakePair([acts]), [segments(101)])


@pytest.mark.parametrize(
    ("columns", "named", "not_named"),
    [
        (slice(0, 1), ["Model A ('x') computes 2 of them"], ["Model B"]),
        (slice(2, 3), ["Model B ('y') computes 2 of them"], ["Model A"]),
        (slice(0, 3), ["Model A ('x')", "Model B ('y')"], ["weights"]),
    ],
)
def test_the_model_whose_activations_are_not_finite_is_named(
    columns: slice, named: list[str], not_named: list[str]
) -> None:
    acts = torch.ones(101, 3)
    acts[3:5, columns] = math.inf
    with pytest.raises(ValueError) as error:
        rows_of(FakePair([acts]), [segments(101)])
    assert all(x in str(error.value) for x in [*named, "in another dtype"])
    assert not any(x in str(error.value) for x in not_named)


def test_weights_that_are_not_finite_are_said_to_be_the_cause() -> None:
    acts = torch.ones(101, 3)
    acts[3:5, 2] = math.nan
    pair = FakePair([acts])
    with torch.no_grad():
        pair.b.model.weight[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="1 of 2 tensors, the first is 'weight'") as error:
        rows_of(pair, [segments(101)])
    assert "Get its checkpoint again" in str(error.value) and "dtype" not in str(error.value)


def test_an_infinite_first_position_is_no_fault_of_the_model() -> None:
    acts = torch.ones(5, 3)
    acts[0] = math.inf
    assert len(rows_of(FakePair([acts]), [segments(5)])[0]) == 4


def test_outliers_are_counted_for_each_model() -> None:
    acts = torch.ones(20, 3)
    acts[2, :2], acts[4, 2], acts[5, :] = 10, 10, 10
    _, counts = rows_of(FakePair([acts]), [segments(20)])
    assert (counts.outlier, counts.outlier_a, counts.outlier_b) == (3, 2, 2)


def test_rows_say_where_they_come_from() -> None:
    acts = torch.arange(8).float()[:, None].expand(8, 3) + 100
    pair = FakePair([acts[:4], acts[4:]])
    (rows,) = paired_activations(pair, batches_of([segments(4), segments(4)]), PairCounts())
    assert rows.context.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.segment.tolist() == [1, 2, 3, 1, 2, 3]
    assert torch.equal(rows.acts[:, 0], 100 + rows.context * 4 + rows.segment)


@pytest.mark.parametrize("n", [1, 3, 16])
def test_the_size_of_a_forward_pass_changes_no_activation(pair: ModelPair, n: int) -> None:
    stream = stream_of(pair, reference_pages()[:1], context_size=24)
    contexts = [c.segments for c in in_order(stream.batches(PairCounts()))[:7]]
    one, _ = rows_of(pair, contexts, size=1, outlier_factor=math.inf)
    many, _ = rows_of(pair, contexts, size=n, outlier_factor=math.inf)
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_pass_that_starts_at_a_bookmark_gives_the_rest(pair: ModelPair) -> None:
    stream = stream_of(pair, reference_pages()[:4], batch_size_prompts=2, n_pairs=1500)
    counts = PairCounts()
    whole = list(paired_activations(pair, stream.batches(counts), counts, outlier_factor=1.1))
    assert len(whole) > 4 and counts.outlier > 0
    for i in (0, 2, len(whole) - 1):
        after, again = whole[i].after, PairCounts()
        rest = list(
            paired_activations(pair, stream.batches(again, after.values["text"]), again, 1.1, after)
        )
        assert len(rest) == len(whole) - 1 - i
        for one, other in zip(rest, whole[i + 1 :], strict=True):
            assert torch.equal(one.acts, other.acts) and torch.equal(one.context, other.context)
        assert again == counts


def test_origins_name_the_document_and_each_models_token_and_position(pair: ModelPair) -> None:
    texts = ["The cat sat on the mat.", "In 1989 the cat was here."]
    counts = PairCounts()
    batches = list(stream_of(pair, texts).batches(counts))
    (rows,) = paired_activations(pair, batches, counts, outlier_factor=math.inf)
    contexts, found = in_order(batches), origins(rows)
    for i, (c, s) in enumerate(zip(rows.context.tolist(), rows.segment.tolist(), strict=True)):
        before = list(contexts[c].segments)[: s + 1]
        ids_a = [t for segment in before for t in segment.ids_a]
        ids_b = [t for segment in before for t in segment.ids_b]
        assert found["document"][i] == c
        assert (found["position_a"][i], found["token_a"][i]) == (len(ids_a) - 1, ids_a[-1])
        assert (found["position_b"][i], found["token_b"][i]) == (len(ids_b) - 1, ids_b[-1])
