import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.contexts import POOL_BATCHES, Context, ContextStream, PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.data.text.datasets import Rows
from tests.helpers import source_of, stream_of

PAGES = reference_pages()[:30]


def contexts_of(stream: ContextStream, counts: PairCounts | None = None) -> list[Context]:
    counts = counts or PairCounts()
    return [context for batch in stream.batches(counts) for context in batch.contexts]


def test_contexts_fit_both_models_and_hold_every_pair(pair: ModelPair) -> None:
    counts = PairCounts()
    contexts = [c.segments for c in in_order(stream_of(pair, PAGES[:3]).batches(counts))]
    for context in contexts:
        assert context[0] == pair.bos_segment
        assert context.n_tokens <= 32
    assert sum(len(c) - 1 for c in contexts) == counts.coverage.pairs
    assert counts.texts == 3


def test_contexts_in_order_are_the_text_in_order(pair: ModelPair) -> None:
    contexts = in_order(stream_of(pair, PAGES[:3], batch_size_prompts=2).batches(PairCounts()))
    read = [i for c in contexts for i in c.segments.ids_a[len(pair.a.bos_ids) :]]
    expected = [i for page in PAGES[:3] for i in pair.segments(page)[0].ids_a]
    assert read == expected


def test_batches_hold_contexts_of_like_length(pair: ModelPair) -> None:
    texts = [page[: 20 * (i % 7 + 1)] for i, page in enumerate(PAGES * 4)]
    batches = list(
        stream_of(pair, texts, context_size=128, batch_size_prompts=2).batches(PairCounts())
    )
    used = padded = 0
    for batch in batches:
        lengths = [context.segments.n_tokens for context in batch.contexts]
        assert len(lengths) * max(lengths) <= 2 * 128
        used, padded = used + sum(lengths), padded + len(lengths) * max(lengths)
    assert used / padded > 0.9
    in_text_order = [c.number for batch in batches for c in batch.contexts]
    assert in_text_order != sorted(in_text_order)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_each_source_gives_its_share_of_the_pairs(
    pair: ModelPair, weights: tuple[float, float]
) -> None:
    # The second source has documents four times as long, and fewer of them to the pair.
    long = [(PAGES[i] * 4)[:1000] for i in range(30)]
    short = [page[:250] for page in PAGES * 6]
    sources = [source_of(short, weights[0]), source_of(long, weights[1])]
    stream = ContextStream(pair, sources, 64, n_pairs=6000)
    *_, last = stream.batches(PairCounts())
    a, b = (source["n_pairs"] for source in last.after["sources"])
    assert a + b == 6000
    assert a / 6000 == pytest.approx(weights[0] / sum(weights), abs=0.06)


def test_a_pass_ends_with_the_source_whose_turn_it_is_and_says_so(
    pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [source_of(PAGES[:2]), source_of(PAGES[2:20])]
    counts = PairCounts()
    contexts_of(ContextStream(pair, sources, 64), counts)
    assert 3 <= counts.texts < 20
    assert "The pass ends before the other sources, since mine has ended" in caplog.text
    caplog.clear()
    contexts_of(stream_of(pair, PAGES[:2], n_pairs=10**6))
    assert "The pass ends before the 1000000 pairs asked for" in caplog.text
    caplog.clear()
    contexts_of(stream_of(pair, PAGES[:2]))
    contexts_of(stream_of(pair, PAGES[:2], n_pairs=100))
    assert caplog.text == ""


@pytest.mark.slow
def test_held_out_and_training_documents_are_apart_and_together_all(pair: ModelPair) -> None:
    parts = {}
    for part in ("training", "held_out", "all"):
        counts = PairCounts()
        stream = stream_of(pair, PAGES, part=part, eval_every_n_documents=4)
        contexts = in_order(stream.batches(counts))
        # Two pages may have a short context in common.
        parts[part] = {(c.document, *c.segments.ids_a) for c in contexts}
        assert counts.texts == {"training": 23, "held_out": 7, "all": 30}[part]
    assert not parts["training"] & parts["held_out"]
    assert parts["training"] | parts["held_out"] == parts["all"]


def test_as_many_pairs_as_asked_for_the_last_context_cut_short(pair: ModelPair) -> None:
    contexts = contexts_of(stream_of(pair, PAGES, n_pairs=333))
    assert sum(len(c.segments) - 1 for c in contexts) == 333


@pytest.mark.parametrize("document", ["", " \n", None])
def test_an_empty_document_has_no_context_and_is_counted(pair: ModelPair, document: Any) -> None:
    counts = PairCounts()
    contexts = contexts_of(stream_of(pair, [PAGES[0], document, PAGES[1]]), counts)
    assert counts.texts == 3
    assert {0, 2} <= {c.document for c in contexts} <= {0, 1, 2}
    assert counts.unreadable == 0


@pytest.mark.slow
def test_a_document_of_ten_megabytes_is_read_in_linear_time(pair: ModelPair) -> None:
    page = "".join(PAGES)
    counts = PairCounts()
    stream = stream_of(pair, [page * (10_000_000 // len(page))], context_size=256, n_pairs=50_000)
    assert sum(len(c.segments) - 1 for c in contexts_of(stream, counts)) == 50_000


@pytest.mark.slow
def test_a_stream_that_starts_at_a_place_gives_the_rest(pair: ModelPair, tmp_path: Path) -> None:
    # Two sources, one a streamed data set of two files, of which a place is not just a number.
    for name, pages in (("1", PAGES[:8]), ("2", PAGES[8:16])):
        lines = "\n".join(json.dumps({"text": page}) for page in pages)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = [str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")]
    streamed = load_dataset("json", data_files=files, split="train", streaming=True)
    sources = [Source(SourceConfig("x"), Rows(streamed, "x")), source_of(PAGES[16:], 2)]  # type: ignore[arg-type]
    stream = ContextStream(pair, sources, 32, batch_size_prompts=1, part="training", seed=3)
    counts = PairCounts()
    whole = list(stream.batches(counts))
    assert len(whole) > 2 * POOL_BATCHES
    for i in (0, 10, POOL_BATCHES, POOL_BATCHES + 30, len(whole) - 1):
        place = json.loads(json.dumps(whole[i].after))
        again = PairCounts()
        rest = list(stream.batches(again, place))
        assert [b.contexts for b in rest] == [b.contexts for b in whole[i + 1 :]]
        assert again == counts


def test_processes_share_the_documents() -> None:
    rows = Rows(source_of(PAGES).rows.dataset, "mine")
    read: Counter[str] = Counter()
    for rank in range(3):
        share = Source(SourceConfig("mine"), rows.share(rank, 3))
        read.update(document for document, _ in share.read())
    assert read == Counter(PAGES)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_order_and_another_another(pair: ModelPair) -> None:
    orders = [
        [c.number for c in contexts_of(stream_of(pair, PAGES[:9], batch_size_prompts=1, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.slow
def test_one_source_can_be_read_twice_at_the_same_time(pair: ModelPair) -> None:
    stream = stream_of(pair, PAGES[:6])
    one, other = (stream.batches(PairCounts()) for _ in range(2))
    for a, b in islice(zip(one, other, strict=True), 5):
        assert a.contexts == b.contexts
