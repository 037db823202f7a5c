"""The score of calls whose truth is known, counted by hand."""

import torch

from benchmarks.certain.score import score
from benchmarks.tables.certain_tables import certain_tables
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence

PARTITION = Partition(d_a=1, d_b=1, n_a_exclusive=3, n_b_exclusive=2, n_shared=1)


def evidence() -> LatentEvidence:
    """Latents 0 to 2 are A's, 3 and 4 B's, and 5 is shared."""
    names = dict.fromkeys(LatentEvidence._fields, torch.full((6,), 0.3))
    is_a = torch.tensor([True, True, True, False, False, True])
    called = torch.tensor([True, True, False, True, False, False])
    q = torch.tensor([0.01, 0.01, 0.4, 0.01, torch.nan, torch.nan])
    firings = torch.tensor([150, 50, 100, 400, 500, 900])
    return LatentEvidence(
        **names | {"is_a": is_a, "is_exclusive": called, "q": q, "firings": firings}
    )


SHARES = {
    "English": torch.tensor([0.9, 0.4, 0.8, 0.1, 0.1, 0.5]),
    "Portuguese": torch.tensor([0.1, 0.6, 0.2, 0.9, 0.9, 0.5]),
}


def test_calls_are_right_on_the_language_that_only_their_model_knows() -> None:
    known_to = {"a_exclusive": ["English"], "b_exclusive": ["Portuguese"]}
    found = score(evidence(), PARTITION, SHARES, known_to)
    a = {name: value for name, value in found["a_exclusive"].items() if isinstance(value, int)}
    assert a == {
        "judged": 3,
        "called": 2,
        "right": 1,  # latent 1 fires on Portuguese
        "often": 2,  # latents 0 and 2
        "often_called": 1,
        "often_of_language": 2,
        "often_of_language_called": 1,
    }
    b = found["b_exclusive"]
    assert (b["judged"], b["called"], b["right"]) == (1, 1, 1)
    assert (b["often"], b["often_called"]) == (2, 1)
    assert found["a_exclusive"]["is_called"] == [True, True, False]


def test_calls_on_any_language_that_only_their_model_knows_are_right() -> None:
    found = score(evidence(), PARTITION, SHARES, {"a_exclusive": ["English", "Portuguese"]})
    assert found["a_exclusive"]["right"] == found["a_exclusive"]["called"] == 2
    assert found["a_exclusive"]["language"] == [1.0, 1.0, 1.0]


def test_of_a_model_that_alone_knows_nothing_no_call_is_right() -> None:
    found = score(evidence(), PARTITION, SHARES, {"b_exclusive": ["Portuguese"]})
    assert found["a_exclusive"]["called"] == 2
    assert found["a_exclusive"]["right"] == 0


def test_the_table_has_each_case_and_side() -> None:
    known_to = {"a_exclusive": ["English"], "b_exclusive": ["Portuguese"]}
    row = {
        "certain_case": "language-tiny",
        "share": 0.0,
        "is_null": False,
        "score": score(evidence(), PARTITION, SHARES, known_to),
        "used": {side: {"tested": 2, "used": 1, "right": 1} for side in known_to},
        "known_to": known_to,
        "knows_more": {"English": "a", "Portuguese": None},
    }
    null = {**row, "is_null": True, "known_to": {}, "knows_more": {"English": None}}
    counts = dict(worse=9, worse_right=8, different=3, different_right=2, others=7, alike=4)
    row_of_both = {**row, "in_both": dict.fromkeys(known_to, counts)}
    calls, in_both, named = certain_tables([row_of_both, row_of_both, null])
    name = "language-tiny: A"
    assert calls.cells[1] == [name, "2", "6", "2, 2", "2 of 4", "2 of 4", "2 of 4"]
    assert calls.cells[3][:1] + calls.cells[3][4:5] == [
        "null: one model twice: A",
        "nothing to find",
    ]
    # Rows without the measure do not count.
    assert in_both.cells[1:] == [
        [side, "2", "18, 16 on what only this model knows", "3, 3", "4 of 6", "8 of 14"]
        for side in (name, "language-tiny: B")
    ]
    assert named.cells[1] == ["language-tiny", "English", "2", "0", "0", "A"]
    assert named.cells[2] == ["language-tiny", "Portuguese", "0", "0", "2", "B"]
    assert named.cells[3] == ["null: one model twice", "English", "0", "0", "1", "neither"]
