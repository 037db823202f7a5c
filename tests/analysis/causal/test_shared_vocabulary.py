from collections import Counter

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from sae_lens_dfc.analysis.causal.shared_vocabulary import (
    END,
    common_outcomes,
    jensen_shannon,
    outcome_probabilities,
    token_texts,
)
from sae_lens_dfc.data.pair import ModelPair


def test_a_divergence_worked_by_hand() -> None:
    # m = (3/4, 1/4): KL(p || m) = log2(2/3) / 2 + log2(2) / 2 = 0.20752, KL(q || m) = log2(4/3) =
    # 0.41504.
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    assert jensen_shannon(p, q).item() == pytest.approx(0.31128, abs=1e-5)


def test_divergences_are_scipys_whatever_the_order() -> None:
    p, q = torch.rand(2, 5, 40, generator=torch.Generator().manual_seed(0)).double().pow(4)
    p, q = p / p.sum(dim=-1, keepdim=True), q / q.sum(dim=-1, keepdim=True)
    expected = torch.tensor(
        [jensenshannon(x, y, base=2) ** 2 for x, y in zip(p.numpy(), q.numpy(), strict=True)]
    )
    torch.testing.assert_close(jensen_shannon(p, q), expected)
    torch.testing.assert_close(jensen_shannon(q, p), expected)
    assert torch.equal(jensen_shannon(p, p), torch.zeros(5).double())


def test_each_outcome_is_one_text_in_both_vocabularies(pair: ModelPair) -> None:
    a, b = common_outcomes(pair.a, pair.b)
    spelled_a = pair.a.tokenizer.convert_ids_to_tokens(a.tokens.tolist())
    spelled_b = pair.b.tokenizer.convert_ids_to_tokens(b.tokens.tolist())
    # Byte-level BPE spells a space Ġ and a newline Ċ, the other one ▁ and the byte <0x0A>.
    by_outcome = {
        i: s.replace("Ġ", " ").replace("Ċ", "\n").strip().lower()
        for i, s in zip(a.outcomes.tolist(), spelled_a, strict=True)
    }
    n_same = 0
    for outcome, spelling in zip(b.outcomes.tolist(), spelled_b, strict=True):
        text = spelling.replace("▁", " ")
        if spelling.startswith("<0x"):
            text = chr(int(spelling[3:5], 16))
        if text.isascii() and text.isprintable():
            assert by_outcome[outcome] == text.strip().lower()
            n_same += len(text.strip()) > 1
    assert n_same > 50
    assert len(set(by_outcome.values())) == len(by_outcome)
    assert len(by_outcome) == a.n_outcomes - 1 == b.n_outcomes - 1


def test_the_texts_of_a_texts_tokens_make_the_text(pair: ModelPair) -> None:
    for model in (pair.a, pair.b):
        texts = token_texts(model)
        ids: list[int] = model.tokenizer.encode("the cat sat on the mat.", add_special_tokens=False)
        assert "".join(texts[i] for i in ids) == "the cat sat on the mat."


def test_parts_of_characters_and_special_tokens_are_no_outcome(pair: ModelPair) -> None:
    texts = token_texts(pair.a)
    assert 0 not in texts  # <s>
    [byte] = [i for i, s in enumerate(_spelled(pair)) if s == "Ã"]  # the first byte of é
    assert byte not in texts


def _spelled(pair: ModelPair) -> list[str]:
    return pair.a.tokenizer.convert_ids_to_tokens(list(range(len(pair.a.tokenizer))))  # type: ignore[return-value]


def test_the_end_of_an_answer_is_one_outcome_whatever_the_token(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = common_outcomes(pair.a, pair.b)[0].n_outcomes
    monkeypatch.setattr(
        "sae_lens_dfc.analysis.causal.shared_vocabulary.stop_ids", lambda _model: [0, 5]
    )
    assert token_texts(pair.a)[0] == token_texts(pair.b)[5] == END
    a, b = common_outcomes(pair.a, pair.b)
    # Of the texts, 5's may be lost.
    assert before - 1 <= a.n_outcomes <= before + 1
    [end] = set(a.outcomes[(a.tokens == 0) | (a.tokens == 5)].tolist())
    assert {end} == set(b.outcomes[(b.tokens == 0) | (b.tokens == 5)].tolist())


def test_probabilities_sum_to_one_and_are_those_of_the_texts(pair: ModelPair) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [token_texts(model) for model in (pair.a, pair.b)]
    texts = [{i: s.strip().casefold() or " " for i, s in t.items()} for t in texts]
    both = set(texts[0].values()) & set(texts[1].values())
    found: list[Counter[int]] = []
    for model, text, outcomes in zip(
        (pair.a, pair.b), texts, common_outcomes(pair.a, pair.b), strict=True
    ):
        logits = 5 * torch.randn(3, 2, model.model.cfg.d_vocab, generator=generator)
        given = outcome_probabilities(logits, outcomes)
        torch.testing.assert_close(given.sum(dim=-1), torch.ones(3, 2).double())
        assert given.shape == (3, 2, outcomes.n_outcomes)
        expected: Counter[str | None] = Counter()
        for token, p in enumerate(logits[2, 1].double().softmax(dim=-1).tolist()):
            expected[text.get(token) if text.get(token) in both else None] += p
        assert given[2, 1, -1].item() == pytest.approx(expected.pop(None), abs=1e-6)
        assert sorted(given[2, 1, :-1].tolist()) == pytest.approx(
            sorted(expected.values()), abs=1e-6
        )
        found.append(Counter(outcomes.outcomes.tolist()))
    assert found[0].keys() == found[1].keys()
