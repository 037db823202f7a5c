import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.alignment.align import TEMPLATE
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.contexts import ContextStream, PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import MAX_GROUPS, check_groups
from sae_lens_dfc.data.sources import Source, aligned_pieces, decoded
from sae_lens_dfc.data.text.datasets import Rows
from tests.helpers import source_of, stream_of

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
        # A pre-tokenized context holds several documents, parted by special tokens.
        assert list(decoded(model.tokenizer, [*bos, *ids, *bos, *ids])) == [TEXT, TEXT]  # type: ignore[misc]
        assert read_by_a(pair, [*bos, *ids], owner) == TEXT  # type: ignore[misc]


def test_token_ids_of_another_tokenizer_are_refused(pair: ModelPair) -> None:
    with pytest.raises(
        ValueError, match="Token ids from 3 to 100000 are not in the vocabulary of tokenizer"
    ):
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


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def test_why_documents_are_left_out_is_said_once_and_when_they_are_too_many(
    chatty: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"role": "user", "content": "The cat. " * 4}]
    picture = [{"role": "user", "content": [{"type": "image", "text": None}]}]
    shown = [{"role": "user", "content": [{"type": "text", "text": "The cat. " * 4}]}]

    def count(chats: list[Any], **kwargs: Any) -> tuple[int, int]:
        source, counts = source_of(chats, column="messages"), PairCounts()
        source.cfg = SourceConfig("mine", **kwargs)
        list(
            ContextStream(chatty, [source], 64, part="training", eval_every_n_documents=2).batches(
                counts
            )
        )
        return counts.texts, counts.unreadable

    # Each second document is held out, and counts as a document all the same.
    chats = [one for chat in (good, [CALL], good, [CALL]) for one in (chat, good)]
    assert count(chats, max_unreadable=0.5) == (4, 2)
    [line] = caplog.messages
    assert line.startswith("Document 2 of mine cannot be read and is skipped")
    assert "Message 0 calls a tool (tool_calls)" in line
    with pytest.raises(ValueError, match="2 of the 4 documents.*number 6: Message 0 calls a tool"):
        count(chats)
    with pytest.raises(ValueError, match="1 of the 1 doc.*Message 0 has a part of type 'image'"):
        count([picture, shown, shown], max_unreadable=0.9)
    assert count([picture, shown, shown, shown], max_unreadable=1) == (2, 1)
    assert count([picture] * 4, max_unreadable=1) == (2, 2)


def test_a_mapping_that_is_no_row_of_answers_is_no_document(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="A document must be text.*got dict: \"{'a': 1}\""):
        list(aligned_pieces(pair, {"a": 1}))


def test_chats_in_other_forms_are_read_as_the_same_chat(chatty: ModelPair) -> None:
    said = [("user", "human", "Who?"), ("assistant", "gpt", TEXT)]
    usual = [{"role": role, "content": text} for role, _, text in said]
    sharegpt = [{"from": by, "value": text} for _, by, text in said]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in usual]
    expected = list(aligned_pieces(chatty, usual))
    assert list(aligned_pieces(chatty, sharegpt)) == expected
    assert list(aligned_pieces(chatty, parts)) == expected


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
        ({"id": [1], "conversations": [[]]}, None, "conversations"),
        ({"conversation": [[]], "messages": [[]]}, None, "messages"),
        ({"conversation": [[]], "language": ["x"]}, None, "conversation"),
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


# --- as a user meets it ---

NAMED = [
    [{"role": "user", "content": f"Who is number {i}?", **({"name": "Ann"} if i % 3 == 0 else {})}]
    + [{"role": "assistant", "content": TEXT * 2}]
    for i in range(9)
]


def cached(models: list[str], path: Path, to: Path, *flags: str) -> int:
    templates = ("--model-a.chat-template", TEMPLATE_A, "--model-b.chat-template", TEMPLATE_B)
    small = ("--context-size", "64", "--eval-every-n-documents", "4", "--cache-dtype", "float32")
    asked = ("--dataset-path", str(path), "--cache-path", str(to))
    return main(["cache", *models, *templates, *small, *asked, *flags])


@pytest.fixture
def models(llama_folder: Path, gpt2_folder: Path) -> list[str]:
    return ["--model-a.model-name", str(llama_folder), "--model-b.model-name", str(gpt2_folder)]


@pytest.mark.slow
def test_chats_make_the_same_activations_from_every_kind_of_file(
    models: list[str], tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in NAMED))
    rows = Dataset.from_json(str(tmp_path / "c.jsonl"))
    assert isinstance(rows, Dataset)
    (tmp_path / "folder").mkdir()
    rows.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    rows.save_to_disk(tmp_path / "saved")
    asked = [("c.jsonl",), ("folder",), ("saved", "--streaming", "false")]
    acts: list[torch.Tensor] = []
    for i, (name, *flags) in enumerate(asked):
        assert cached(models, tmp_path / name, tmp_path / f"cache-{i}", *flags) == 0
        cache = PairedActivationsCache(tmp_path / f"cache-{i}")
        assert cache.counts.unreadable == 0
        acts.append(torch.cat([cache.shard(n)["acts"] for n in range(len(cache.shards))]))
    assert len(acts[0]) > 100
    assert all(torch.equal(one, acts[0]) for one in acts)


@pytest.mark.slow
def test_a_set_whose_chats_call_tools_is_refused_with_what_it_holds(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": c} for c in ([*NAMED[0], CALL], *NAMED)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cached(models, tmp_path / "c.jsonl", tmp_path / "cache") == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "1 of the 1 documents of" in line and "Message 2 calls a tool (tool_calls)" in line


def test_a_data_set_of_empty_documents_names_its_columns(pair: ModelPair) -> None:
    source = Source(SourceConfig("mine"), rows(text=[None, "", ""], body=["a cat", "b", "c"]))
    with pytest.raises(ValueError) as error:
        list(ContextStream(pair, [source], 32).batches(PairCounts()))
    assert "All 3 documents of 'mine'" in str(error.value)
    assert "columns are ['text', 'body']: name another as text_column" in str(error.value)


def test_held_out_documents_that_are_empty_are_no_error(pair: ModelPair) -> None:
    stream = stream_of(pair, ["a cat", ""], part="held_out", eval_every_n_documents=2)
    counts = PairCounts()
    assert list(stream.batches(counts)) == [] and (counts.texts, counts.empty) == (1, 1)


# --- groups of documents ---


def groups_in(pair: ModelPair, source: Source) -> list[str]:
    stream = ContextStream(pair, [source], context_size=16)
    return [context.group for context in in_order(stream.batches(PairCounts()))]


def test_documents_are_grouped_by_their_source_or_by_a_column(pair: ModelPair) -> None:
    two = rows(text=[TEXT] * 4, language=["en", "pt (BR)", None, ""])
    assert set(groups_in(pair, Source(SourceConfig("mine"), two, "mine"))) == {"mine"}
    by_language = groups_in(pair, Source(SourceConfig("mine"), two, "mine", by="language"))
    # One group after the other, each with as many contexts as the same text has.
    n = len(by_language) // 4
    assert by_language == ["en"] * n + ["pt-BR"] * n + ["None"] * n + ["empty"] * n


def test_a_resumed_reading_keeps_the_groups(pair: ModelPair) -> None:
    two = rows(text=[TEXT * 3, TEXT], language=["en", "pt"])
    source = Source(SourceConfig("mine"), two, by="language")
    stream = ContextStream(pair, [source], context_size=16, batch_size_prompts=1)
    batches = list(stream.batches(PairCounts()))
    whole = [context for batch in batches for context in batch.contexts]
    assert {context.group for context in whole} == {"en", "pt"}
    for i, batch in enumerate(batches[:-1]):
        rest = list(stream.batches(PairCounts(), batch.after))
        again = [(c.number, c.group) for one in rest for c in one.contexts]
        assert again == [(c.number, c.group) for one in batches[i + 1 :] for c in one.contexts]


def test_a_column_to_group_by_must_exist() -> None:
    with pytest.raises(ValueError, match="has no column 'lang' to group its documents by"):
        Source(SourceConfig("mine"), rows(text=[TEXT]), by="lang")


def test_a_text_of_too_many_groups_is_refused() -> None:
    check_groups({str(i) for i in range(MAX_GROUPS)})
    with pytest.raises(ValueError, match="fall into 101 groups .0, 1, 10 …., and at most 100"):
        check_groups({str(i) for i in range(MAX_GROUPS + 1)})
