import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_dfc.data.alignment.segments import Segment, Segments

IDS = st.lists(st.integers(0, 99), max_size=3).map(tuple)
LISTS = st.lists(st.builds(Segment, IDS, IDS), max_size=8)


@given(LISTS)
def test_segments_are_the_list_they_were_made_of(given_: list[Segment]) -> None:
    segments = Segments.of(given_)
    assert list(segments) == given_ and segments == given_ and len(segments) == len(given_)
    assert [segments[i] for i in range(len(given_))] == given_
    assert segments != [*given_, Segment((1,), (1,))]


@given(LISTS, st.integers(-9, 9), st.integers(-9, 9))
def test_a_slice_is_a_lists_slice(given_: list[Segment], start: int, stop: int) -> None:
    part = Segments.of(given_)[start:stop]
    assert part == given_[start:stop]
    assert len(part.ids_a) == sum(len(s.ids_a) for s in given_[start:stop])
    assert part.n_tokens == max(len(part.ids_a), len(part.ids_b))


@given(LISTS, st.builds(Segment, IDS, IDS))
def test_one_in_front_moves_the_others_back(given_: list[Segment], first: Segment) -> None:
    assert Segments.of(given_).after(first) == [first, *given_]


@given(LISTS)
def test_positions_are_of_the_last_token_of_each(given_: list[Segment]) -> None:
    segments = Segments.of(given_)
    for i, segment in enumerate(given_):
        if segment.ids_a:
            assert segments.ids_a[segments.last_a[i]] == segment.ids_a[-1]
        if segment.ids_b:
            assert segments.ids_b[segments.last_b[i]] == segment.ids_b[-1]


def test_segments_cannot_be_taken_out_of_order() -> None:
    with pytest.raises(ValueError, match="sliced with step 1, got 2"):
        Segments.of([])[::2]
    with pytest.raises(IndexError):
        Segments.of([])[0]
