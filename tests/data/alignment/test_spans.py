import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from sae_lens_dfc.data.alignment.spans import _may_join, true_spans


def bare(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def spans_of(
    tokenizer: Tokenizer, text: str, own: list[tuple[int, int]], strings: list[str]
) -> list[list[int]]:
    return true_spans(tokenizer, text, np.array(own).reshape(-1, 2), strings).tolist()


def test_an_accent_that_the_normalizer_joined_is_in_the_letters_span() -> None:
    own = [(0, 1), (2, 3)]
    assert spans_of(bare(normalizers.NFC()), "e\u0301x", own, ["é", "x"]) == [[0, 2], [2, 3]]
    # A tokenizer that reads them as they are has read the letter alone.
    apart = [(0, 1), (1, 2), (2, 3)]
    for normalizer in (None, normalizers.Lowercase(), normalizers.Replace(" ", "▁")):
        spans = spans_of(bare(normalizer), "e\u0301x", apart, ["e", "\u0301", "x"])
        assert spans == [list(span) for span in apart]


def test_an_accent_that_the_normalizer_drops_is_in_no_span() -> None:
    normalizer = normalizers.BertNormalizer(lowercase=True)
    assert spans_of(bare(normalizer), "e\u0301x", [(0, 1), (2, 3)], ["e", "x"]) == [[0, 1], [2, 3]]


def test_marks_in_another_order_belong_together() -> None:
    # The dot below comes first in NFC: after "q" and one mark this model has read the other one.
    own, strings = [(0, 1), (1, 2), (2, 3)], ["q", "\u0323", "\u0301"]
    assert spans_of(bare(normalizers.NFC()), "q\u0301\u0323", own, strings) == [[0, 3]] * 3


def test_a_mark_behind_a_dropped_character_belongs_to_what_is_before_it() -> None:
    # The musical mark comes before the accent in NFD, once the character between them is gone; then
    # the accent is dropped.
    text = "k\u0301\U0001d173\U0001d170"
    own = [(0, 2)]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    assert normalizer.normalize_str(text) == "k\U0001d170"
    assert spans_of(bare(normalizer), text, own, ["[UNK]"]) == [[0, 4]]


def test_each_byte_of_a_row_of_unknown_characters_has_the_span_of_its_own() -> None:
    strings = [f"<0x{byte:02X}>" for byte in "日é".encode()]
    own = [(1, 3)] * 5
    assert spans_of(bare(), "a日é", own, strings) == [[1, 2]] * 3 + [[2, 3]] * 2
    # Unless they are other bytes than the text's.
    assert spans_of(bare(), "a日e", own, strings) == [[1, 3]] * 5


def test_spaces_at_a_tokens_end_are_in_its_span() -> None:
    assert spans_of(bare(), "\n  x", [(0, 1), (3, 4)], ["ĊĠ", "Ġx"]) == [[0, 2], [3, 4]]
    assert spans_of(bare(), "\n  x", [(0, 2), (2, 4)], ["ĊĠ", "Ġx"]) == [[0, 2], [2, 4]]
    # The letter itself is no space.
    assert spans_of(bare(), "Ġ x", [(0, 1), (2, 3)], ["Ġ", "x"]) == [[0, 1], [2, 3]]


def test_a_dropped_byte_does_not_move_the_next_ones() -> None:
    tokenizer = Tokenizer(models.BPE({"!": 0, "?": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding = tokenizer.encode("!\x1d?")
    # The tokenizers library counts the letters it has kept; when it no longer does,
    # `_count_dropped` can go.
    assert encoding.offsets == [(0, 1), (1, 2)]
    assert spans_of(tokenizer, "!\x1d?", encoding.offsets, encoding.tokens) == [[0, 1], [2, 3]]


@pytest.mark.slow
def test_all_that_normalizing_joins_with_what_is_before_it_is_known() -> None:
    every = map(chr, range(sys.maxunicode + 1))
    assigned = [c for c in every if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    decompositions = [unicodedata.decomposition(c).split() for c in assigned]
    second = {
        chr(int(p[1], 16)) for p in decompositions if len(p) == 2 and not p[0].startswith("<")
    }
    second |= {chr(code) for code in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}
    for character in assigned:
        first = unicodedata.normalize("NFKD", character)[0]
        joins = unicodedata.combining(first) or first in second
        assert _may_join(character) or not joins, ascii(character)
