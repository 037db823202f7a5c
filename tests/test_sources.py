from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sae_lens_dfc.alignment import TEMPLATE
from sae_lens_dfc.contexts import ContextStream, PairCounts, in_order
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.sources import Source, SourceConfig, aligned_pieces, decoded
from sae_lens_dfc.texts import Rows
from tests.helpers import source_of

TEXT = "The cat sat on the mat in 1989."
TEMPLATE_A = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
TEMPLATE_B = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </>{% endfor %}"


@pytest.fixture
def chatty(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> ModelPair:
    monkeypatch.setattr(pair.a.tokenizer, "chat_template", TEMPLATE_A)
    monkeypatch.setattr(pair.b.tokenizer, "chat_template", TEMPLATE_B)
    return pair


def rows(**columns: list[Any]) -> Rows:
    return Rows(Dataset.from_dict(columns), "mine")


def read_by_a(pair: ModelPair, document: Any, owner: str = "a") -> str:
    pieces = aligned_pieces(pair, document, owner)  # type: ignore[arg-type]
    return "".join(str(pair.a.tokenizer.decode(segments.ids_a)) for segments, _ in pieces)


def test_token_ids_of_either_model_are_read_as_the_text_they_stand_for(pair: ModelPair) -> None:
    for owner, model in (("a", pair.a), ("b", pair.b)):
        ids = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        bos = [model.tokenizer.bos_token_id]
        # A pre-tokenised context holds several documents, parted by special tokens.
        assert list(decoded(model.tokenizer, [*bos, *ids, *bos, *ids])) == [TEXT, TEXT]  # type: ignore[misc]
        assert read_by_a(pair, [*bos, *ids], owner) == TEXT  # type: ignore[misc]


def test_token_ids_of_another_tokenizer_are_refused(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="Token ids from 3 to 100000 are not of tokenizer"):
        list(decoded(pair.a.tokenizer, [3, 100_000]))


def test_chats_are_read_by_their_messages(chatty: ModelPair) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": TEXT}]
    ((_, coverage),) = aligned_pieces(chatty, chat)
    assert coverage.dropped_a[TEMPLATE] > 0 and coverage.pairs > 5


def test_of_a_contrastive_row_both_models_read_both_answers(chatty: ModelPair) -> None:
    row = {"prompt": "Who?", "completion_a": TEXT, "completion_b": "The mat."}
    read = read_by_a(chatty, row)
    assert TEXT[:-1] in read and "The mat" in read and read.count("Who?") == 2


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_document_of_any_kind_has_nothing_to_read(pair: ModelPair, empty: Any) -> None:
    assert list(aligned_pieces(pair, empty)) == []


def test_few_documents_that_cannot_be_read_are_counted_and_many_are_an_error(
    chatty: ModelPair,
) -> None:
    good = [{"role": "user", "content": "The cat. " * 4}]
    bad = [{"role": "user", "content": None}]

    def read(chats: list[Any], **kwargs: Any) -> PairCounts:
        rows = Rows(Dataset.from_dict({"messages": chats}), "mine")
        counts = PairCounts()
        stream = ContextStream(chatty, [Source(SourceConfig("mine", **kwargs), rows)], 64)
        contexts = in_order(stream.batches(counts))
        assert len(contexts) == chats.count(good)
        return counts

    counts = read([good, bad, good])
    assert (counts.texts, counts.unreadable) == (3, 1)
    with pytest.raises(
        ValueError, match="2 of the 4 documents of 'mine'.*number 3: A chat is a list"
    ):
        read([good, bad, good, bad])
    assert read([good, bad, good, bad], max_unreadable=0.5).unreadable == 2
    # When the first cannot be read, all may be so: better said at once.
    with pytest.raises(ValueError, match="1 of the 1 documents"):
        read([bad, good], max_unreadable=0.5)


def test_what_is_no_document_is_refused(pair: ModelPair) -> None:
    for document in (3.5, ["a", 1], [1.5]):
        with pytest.raises(ValueError, match="must be text, chat messages or token ids, got"):
            list(aligned_pieces(pair, document))


@pytest.mark.parametrize(
    ("columns", "asked", "read"),
    [
        ({"id": [1], "text": ["x"]}, None, "text"),
        ({"messages": [[]], "other": ["x"]}, None, "messages"),
        ({"input_ids": [[1]]}, None, "input_ids"),
        ({"tokens": [[1]]}, None, "tokens"),
        ({"text": ["x"], "body": ["y"]}, "body", "body"),
        ({"prompt": ["x"], "completion_a": ["y"], "completion_b": ["z"]}, None, None),
        ({"prompt": ["x"], "completion_a": ["y"], "completion_b": ["z"]}, "prompt", "prompt"),
    ],
)
def test_the_column_asked_for_or_else_the_usual_one_is_read(
    columns: dict[str, list[Any]], asked: str | None, read: str | None
) -> None:
    assert Source(SourceConfig("mine", text_column=asked), rows(**columns)).column == read


def test_a_column_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"no text column 'body'; its columns are \['text'\]"):
        Source(SourceConfig("mine", text_column="body"), rows(text=["x"]))
    with pytest.raises(ValueError, match="no text column 'text' or 'messages' or 'input_ids'"):
        Source(SourceConfig("mine"), rows(body=["x"]))


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_above_0_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of source 'mine' must be above 0"):
        SourceConfig("mine", weight)


def test_a_text_file_of_one_column_is_not_taken_for_another(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="no text column 'body'"):
        Source.open(SourceConfig(str(tmp_path / "d.jsonl"), text_column="body"))


def test_web_text_and_chat_make_one_stream(chatty: ModelPair) -> None:
    chat = [{"role": "user", "content": "Who? " * 9}, {"role": "assistant", "content": TEXT * 3}]
    sources = [source_of([TEXT * 8] * 20), source_of([chat] * 20, column="messages")]
    stream = ContextStream(chatty, sources, 64, n_pairs=2000)
    *batches, last = stream.batches(PairCounts())
    a, b = (source["n_pairs"] for source in last.after["sources"])
    assert a == pytest.approx(b, abs=150)
    for context in (c.segments for c in in_order([*batches, last])):
        assert context[0] == chatty.bos_segment and len(context) > 1
