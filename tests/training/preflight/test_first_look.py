"""The first documents: what they are read as, and what they say of the rest."""

import json
from pathlib import Path

import pytest

from sae_lens_dfc import CrosscoderRunnerConfig
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.training.preflight.first_look import (
    Expected,
    FirstLook,
    expected_of_all,
    first_lines,
    look,
    n_documents,
    of_a_pass,
    supply,
)
from tests.helpers import dfc_config, source_of, stream_of


def config(**settings: object) -> CrosscoderRunnerConfig:
    given = {"context_size": 48, "eval_every_n_documents": 4, **settings}
    return CrosscoderRunnerConfig(sae=dfc_config(), **given)  # type: ignore[arg-type]


def pairs_to_train_on(pair: ModelPair, texts: list[str]) -> int:
    stream = stream_of(pair, texts, context_size=48, part="training", eval_every_n_documents=4)
    batches = list(stream.batches(PairCounts()))
    return sum(len(c.segments) - 1 for batch in batches for c in batch.contexts)


def test_a_text_read_to_its_end_has_as_many_pairs_as_training_takes(pair: ModelPair) -> None:
    texts = [*reference_pages()[:10], ""]
    found = look(pair, source_of(texts), config(), seconds=1000)
    assert found.is_whole and found.counts.texts == 9
    assert found.expected_pairs(4) == Expected(pairs_to_train_on(pair, texts), 0)
    assert found.counts.coverage.pairs == sum(found.pairs_of)


@pytest.mark.slow
def test_pairs_of_the_whole_text_are_told_from_its_first_documents(pair: ModelPair) -> None:
    # The first documents are a tenth as long as the rest.
    pages = reference_pages()
    texts = [page[:1500] for page in pages[:30]] + [page[:15_000] for page in pages[30:78]]
    found = look(pair, source_of(texts), config(), seconds=0)
    assert not found.is_whole and 2 < len(found.pairs_of) < 40
    expected = found.expected_pairs(4)
    assert expected is not None
    actual = pairs_to_train_on(pair, texts)
    assert expected.value == pytest.approx(actual, rel=0.25)
    assert 0 < expected.error < 0.5 * expected.value


def test_a_streamed_data_set_says_no_length_and_the_sentence_neither(
    pair: ModelPair, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": page[:3000]}) for page in reference_pages()[:60]]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    source = Source.open(SourceConfig(str(tmp_path / "data")))
    assert n_documents(source.rows) is None
    found = look(pair, source, config(), seconds=0)
    assert not found.is_whole and found.expected_pairs(4) is None
    assert supply([found], config()).startswith("How many pairs there are is not known.")
    assert of_a_pass([found], config(max_unique_pairs=70)) == 70


def test_a_pass_over_several_sources_ends_with_the_first_that_has_no_more() -> None:
    sources = [SourceConfig("mine", weight=3.0), SourceConfig("yours", weight=1.0)]
    looks = [
        FirstLook("mine", pairs_of=[600], is_whole=True),
        FirstLook("yours", pairs_of=[100], is_whole=True),
    ]
    # With 100 of "yours" come 300 of "mine".
    assert expected_of_all(looks, config(sources=sources)) == Expected(400, 0)


def test_the_sentence_says_how_often_each_pair_is_taken() -> None:
    looks = [FirstLook("mine", pairs_of=[1000], is_whole=True)]
    assert supply(looks, config(training_tokens=2500)) == (
        "Pairs to train on: 1,000; training takes 2,500 (training_tokens), each 2.5 times."
    )
    assert "of 500 (max_unique_pairs), each 5.0 times" in supply(
        looks, config(training_tokens=2500, max_unique_pairs=500)
    )
    many = [FirstLook("mine", pairs_of=[10_000], is_whole=True)]
    assert supply(many, config(training_tokens=2500)).endswith("(training_tokens), each once.")


def test_documents_that_cannot_be_read_are_left_to_the_training(pair: ModelPair) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    source = source_of([chat, chat], column="messages")
    assert list(first_lines(pair, [source], config())) == []
    with pytest.raises(ValueError, match="has no chat template"):
        look(pair, source, config(), seconds=1)


def test_a_training_on_two_models_of_the_same_weights_says_so(pair: ModelPair) -> None:
    source = source_of(reference_pages()[:10])
    said = "Both models have the same weights"
    assert not any(said in line for line in first_lines(pair, [source], config()))
    same = ModelPair(pair.a, pair.a)
    assert any(said in line for line in first_lines(same, [source], config()))


@pytest.mark.parametrize(("n", "is_said"), [(3, True), (4, False)])
def test_a_streamed_text_of_which_nothing_is_held_out_says_so(
    n: int, is_said: bool, pair: ModelPair, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": page[:500]}) for page in reference_pages()[:n]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = Source.open(SourceConfig(str(tmp_path)))
    assert n_documents(source.rows) is None
    said = "No document is held out: the text has 3 documents, and every 4th"
    assert any(said in line for line in first_lines(pair, [source], config())) == is_said


def test_empty_documents_are_counted_and_said(pair: ModelPair) -> None:
    source = source_of([reference_pages()[0], None, "", *reference_pages()[1:5]])
    found = look(pair, source, config(), seconds=1000)
    assert (found.counts.texts, found.counts.empty) == (6, 2)
    said = "Of the 6 documents of mine that were read, 2 were empty"
    assert any(said in line for line in first_lines(pair, [source], config()))
