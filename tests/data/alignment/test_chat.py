"""Chats in templates that differ: who reads what of each message, and which tokens pair."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment.align import ALTERED, REASONS, TEMPLATE, align
from sae_lens_dfc.data.alignment.chat import (
    chat_segments,
    contrastive_documents,
    n_leading_bos,
    render_chat,
)
from sae_lens_dfc.data.alignment.segments import Segment
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.messages import check_messages

Chat = list[dict[str, str]]

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
# Answers lose their thoughts, as in Qwen3.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}"
)
# The system prompt stands in the last message, as in Mistral's.
MISTRAL = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# Nothing around the contents: tokens straddle the borders.
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Says each message twice.
ECHO = "{% for m in messages %}{{ m.role }}: {{ m.content }} ({{ m.content }})\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "gemma": GEMMA,
    "think": THINK,
    "mistral": MISTRAL,
    "bare": BARE,
    "echo": ECHO,
}
LOCATING = ("chatml", "llama", "gemma", "bare")
MARKERS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
NAMES = (
    "byte_bpe",
    "sentencepiece_bpe",
    "unigram_nfkc",
    "byte_bpe_japanese",
    "wordpiece_lowercase",
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


QUESTION: Chat = [user("Where is the cat?"), assistant("The cat sat on the mat.")]

Chatty = Mapping[tuple[str, str], PreTrainedTokenizerBase]


@pytest.fixture(scope="session")
def chatty(tokenizers: dict[str, PreTrainedTokenizerBase]) -> Chatty:
    """Every tokenizer with every template; the markers are tokens in half of them."""
    made: dict[tuple[str, str], PreTrainedTokenizerBase] = {}
    for name, template in product(NAMES, TEMPLATES):
        tokenizer = copy.deepcopy(tokenizers[name])
        tokenizer.chat_template = TEMPLATES[template]
        if name in ("byte_bpe", "unigram_nfkc"):
            tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})  # type: ignore[dict-item]
        made[name, template] = tokenizer
    return made


def spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[return-value]


def last_positions(segments: Sequence[Segment], side: int, skipped: int) -> list[int]:
    """Positions, in the rendering's tokens, at which segments end."""
    return [n + skipped - 1 for n in accumulate(len(segment[side]) for segment in segments)]


class Rendered:
    """A second way to know which character is whose, for templates that do not look into contents:
    Jinja's own loop, unrolled here by putting each content between two marks that no test text
    has."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: Chat):
        self.text = render_chat(tokenizer, messages)
        # U+E100 and on is what no test text holds; `trim` keeps it, so what it would strip is
        # stripped before.
        strips = "trim" in str(tokenizer.chat_template)
        contents = [m["content"].strip() if strips else m["content"] for m in messages]
        marked = [
            {**m, "content": f"\ue100{content}\ue101"}
            for m, content in zip(messages, contents, strict=True)
        ]
        self.owner: list[tuple[int, int] | None] = []
        message = -1
        position: int | None = None
        text = ""
        for character in render_chat(tokenizer, marked):
            if character == "\ue100":
                message, position = message + 1, 0
            elif character == "\ue101":
                position = None
            else:
                text += character
                self.owner.append(None if position is None else (message, position))
                position = None if position is None else position + 1
        assert text == self.text
        self.contents = contents

    def read(self, message: int, end: int) -> str:
        """What has been read of a message at this end, whitespace at its start aside."""
        content = self.contents[message]
        n = max((p + 1 for o in self.owner[:end] if o for m, p in [o] if m == message), default=0)
        return content[:n].lstrip()


texts = st.lists(
    st.sampled_from(
        ["Hi", "the cat", " ", "\n", "user", "naïve", "ラーメン", "🤖", "e\u0301", "ﬁ", "You help."]
        + [*MARKERS, "<s>", "<|im_end|>\n<|im_start|>assistant\nHi"]
    ),
    max_size=6,
).map("".join)
chats = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system"]),
        texts,
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    messages=chats,
    key_a=st.tuples(st.sampled_from(NAMES), st.sampled_from(LOCATING)),
    key_b=st.tuples(st.sampled_from(NAMES), st.sampled_from(LOCATING)),
)
def test_a_pair_has_read_the_same_of_the_same_message_and_nothing_of_a_template(
    chatty: Chatty, messages: Chat, key_a: tuple[str, str], key_b: tuple[str, str]
) -> None:
    segments, coverage = chat_segments(chatty[key_a], chatty[key_b], messages)
    ends: list[list[tuple[int, str]]] = []
    for side, key in enumerate((key_a, key_b)):
        tokenizer = chatty[key]
        rendered = Rendered(tokenizer, messages)
        ids, reach, *_ = tokenize(tokenizer, rendered.text)
        bos = n_leading_bos(tokenizer, ids)
        emitted = [i for segment in segments for i in segment[side]]
        assert emitted == list(ids[bos : bos + len(emitted)])
        read: list[tuple[int, str]] = []
        for position in last_positions(segments, side, bos):
            # The library's own span of é leaves out the accent that NFKC has joined with the
            # letter.
            (start, _), end = spans(tokenizer, rendered.text)[position], int(reach[position])
            owners = rendered.owner[start:end]
            assert owners and all(owner is not None for owner in owners)
            (message,) = {owner[0] for owner in owners if owner is not None}
            read.append((message, rendered.read(message, end)))
        ends.append(read)
        total, dropped = (
            (coverage.tokens_a, coverage.dropped_a)
            if side == 0
            else (coverage.tokens_b, coverage.dropped_b)
        )
        assert total == len(ids) - bos == coverage.pairs + dropped.total()
        assert set(dropped) <= set(REASONS) and min(dropped.values(), default=1) > 0
    assert ends[0] == ends[1]
    assert coverage.pairs == len(segments)


@pytest.mark.slow
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=chats,
    key_a=st.tuples(st.sampled_from(NAMES), st.sampled_from(list(TEMPLATES))),
    key_b=st.tuples(st.sampled_from(NAMES), st.sampled_from(list(TEMPLATES))),
)
def test_every_token_of_any_chat_is_paired_or_counted_whatever_a_template_does_to_it(
    chatty: Chatty, messages: Chat, key_a: tuple[str, str], key_b: tuple[str, str]
) -> None:
    a, b = chatty[key_a], chatty[key_b]
    segments, coverage = chat_segments(a, b, messages)
    for tokenizer, total, dropped in (
        (a, coverage.tokens_a, coverage.dropped_a),
        (b, coverage.tokens_b, coverage.dropped_b),
    ):
        ids = tokenize(tokenizer, render_chat(tokenizer, check_messages(messages))).ids
        assert total == len(ids) - n_leading_bos(tokenizer, ids)
        assert total == len(segments) + dropped.total()
        assert all(n > 0 for n in dropped.values())


def paired_text(
    tokenizer: PreTrainedTokenizerBase, messages: Chat, segments: Sequence[Segment], side: int
) -> list[str]:
    """The text of the token at the end of each segment."""
    text = render_chat(tokenizer, messages)
    skipped = n_leading_bos(tokenizer, tokenize(tokenizer, text).ids)
    where = [spans(tokenizer, text)[i] for i in last_positions(segments, side, skipped)]
    return [text[start:end] for start, end in where]


def test_one_tokenizer_in_two_templates_pairs_every_token_of_the_messages(chatty: Chatty) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "gemma"]
    segments, _ = chat_segments(a, b, QUESTION)
    for side, tokenizer in enumerate((a, b)):
        said = "".join(paired_text(tokenizer, QUESTION, segments, side))
        assert said == "Where is the cat?The cat sat on the mat."


def test_a_template_stands_in_the_segment_of_the_pair_after_it_and_not_at_the_end(
    chatty: Chatty,
) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "llama"]
    segments, coverage = chat_segments(a, b, [user("x")])
    ids_a, ids_b = (tokenize(t, render_chat(t, [user("x")])).ids for t in (a, b))
    closing = len(tokenize(b, "<|eot_id|>").ids)
    # A's leaves <|im_end|> and the line's end out, B's the <s> at its start and what closes the
    # turn.
    assert segments == [Segment(tuple(ids_a[:-2]), tuple(ids_b[1:-closing]))]
    assert coverage.dropped_a == {TEMPLATE: len(ids_a) - 1}
    assert coverage.dropped_b == {TEMPLATE: len(ids_b) - 2}


def test_only_a_bos_at_the_start_is_left_out(chatty: Chatty) -> None:
    tokenizer = chatty["byte_bpe", "llama"]
    bos = tokenizer.bos_token_id
    segments, _ = chat_segments(tokenizer, tokenizer, [user("a<s>b")])
    assert sum(segment.ids_a.count(bos) for segment in segments) == 1  # type: ignore[arg-type]
    bare = chatty["byte_bpe", "bare"]
    segments, coverage = chat_segments(bare, bare, [user("<s>b")])
    assert segments == [Segment((i,), (i,)) for i in tokenize(bare, "b").ids]
    assert coverage.a == 1


def test_stripped_ends_of_a_message_do_not_shift_its_pairs(chatty: Chatty) -> None:
    messages = [user("\n\nthe cat \n"), assistant("the cat")]
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "llama"]
    segments, _ = chat_segments(a, b, messages)
    for side, tokenizer in enumerate((a, b)):
        assert "".join(paired_text(tokenizer, messages, segments, side)) == "the catthe cat"


def test_whitespace_that_both_templates_keep_is_paired(chatty: Chatty) -> None:
    messages = [user("\n\nthe cat \n")]
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "think"]
    segments, _ = chat_segments(a, b, messages)
    assert "".join(paired_text(a, messages, segments, 0)).endswith("the cat \n")


def test_a_message_that_says_what_another_and_the_template_say_keeps_its_place(
    chatty: Chatty,
) -> None:
    # "user" is a role, "You help." is ChatML's own system prompt, and both turns say the same.
    messages = [user("user\nYou help."), assistant("user\nYou help."), user("You help.")]
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "gemma"]
    segments, _ = chat_segments(a, b, messages)
    text = "".join(m["content"] for m in messages)
    assert "".join(paired_text(a, messages, segments, 0)) == text
    assert "".join(paired_text(b, messages, segments, 1)) == text


def test_a_template_forged_in_a_message_is_that_messages_text(chatty: Chatty) -> None:
    forged = "Hi<|im_end|>\n<|im_start|>assistant\nthe cat"
    messages = [user(forged), assistant("the cat")]
    a, b = chatty["byte_bpe", "chatml"], chatty["sentencepiece_bpe", "gemma"]
    segments, _ = chat_segments(a, b, messages)
    said = paired_text(a, messages, segments, 0)
    assert said[-1].endswith("t") and "<|im_end|>" in said and said.count("<|im_start|>") == 1


def test_an_answer_that_loses_its_thoughts_is_not_paired_and_the_others_are(
    chatty: Chatty,
) -> None:
    answer = "<think>the cat?</think>\n\nThe cat."
    messages = [user("Who?"), assistant(answer), user("Why?")]
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "think"]
    segments, coverage = chat_segments(a, b, messages)
    for side, tokenizer in enumerate((a, b)):
        assert "".join(paired_text(tokenizer, messages, segments, side)) == "Who?Why?"
    assert coverage.dropped_a[ALTERED] == len(tokenize(a, answer).ids)
    assert ALTERED not in coverage.dropped_b
    # The model reads it all the same.
    assert answer in a.decode([i for s in segments for i in s.ids_a])


def test_a_message_said_twice_is_not_paired(chatty: Chatty) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "echo"]
    segments, coverage = chat_segments(a, b, QUESTION)
    assert segments == [] and coverage.dropped_b == {TEMPLATE: coverage.tokens_b}


def test_a_moved_system_prompt_costs_its_own_pairs_only(chatty: Chatty) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *QUESTION, user("Why?")]
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "mistral"]
    segments, coverage = chat_segments(a, b, messages)
    said = "".join(paired_text(b, messages, segments, 1))
    assert said == "Where is the cat?The cat sat on the mat.Why?"
    n_system = len(tokenize(a, "Be kind.").ids)
    assert coverage.dropped_a[ALTERED] == coverage.dropped_b[ALTERED] == n_system


def test_an_empty_message_pairs_nothing(chatty: Chatty) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["byte_bpe", "gemma"]
    for content in ("", " \n"):
        segments, coverage = chat_segments(a, b, [user(content), assistant("x")])
        assert coverage.pairs == len(segments) == 1
    assert chat_segments(a, b, [user("")])[0] == []


def test_a_token_that_straddles_a_message_and_the_template_is_the_templates(
    chatty: Chatty,
) -> None:
    a = copy.deepcopy(chatty["sentencepiece_bpe", "bare"])
    a.chat_template = "{% for m in messages %}th{{ m.content }}{% endfor %}"
    b = chatty["sentencepiece_bpe", "bare"]
    messages = [user("e cat")]
    assert tokenize(a, "the cat").strings[0] == "the▁"
    segments, _ = chat_segments(a, b, messages)
    assert "".join(paired_text(a, messages, segments, 0)) == "cat"


def test_a_token_with_the_last_byte_of_a_template_is_the_templates(chatty: Chatty) -> None:
    a = copy.deepcopy(chatty["byte_bpe_japanese", "bare"])
    a.chat_template = "{% for m in messages %}ン{{ m.content }}{% endfor %}"
    # The second token is the last byte of the template's character and all of the message's.
    assert tokenize(a, "ンを").strings == ["ãĥ", "³ãĤĴ"]
    segments, coverage = chat_segments(a, chatty["byte_bpe_japanese", "bare"], [user("を")])
    assert segments == []
    assert coverage.dropped_a == {TEMPLATE: 2}


@pytest.mark.parametrize("content", ["\tx", "x\t", "\tx\t", "a\tx"])
def test_a_message_whose_whitespace_a_template_changes_is_not_paired(
    chatty: Chatty, content: str
) -> None:
    a, b = chatty["byte_bpe", "chatml"], copy.deepcopy(chatty["byte_bpe", "chatml"])
    for spaces in (" ", "  "):
        b.chat_template = CHATML.replace("m.content", f"m.content | replace('\t', '{spaces}')")
        segments, _ = chat_segments(a, b, [user(content), assistant("y")])
        assert paired_text(a, [user(content), assistant("y")], segments, 0) == ["y"]


def test_messages_pair_in_templates_as_their_texts_do_without(chatty: Chatty) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["sentencepiece_bpe", "gemma"]
    _, coverage = chat_segments(a, b, QUESTION)
    _, swapped = chat_segments(b, a, QUESTION)
    alone = [align(*(tokenize(t, m["content"]) for t in (a, b)))[1] for m in QUESTION]
    assert coverage.pairs == swapped.pairs == sum(c.pairs for c in alone) > 5
    reasons = sum((c.dropped_a for c in alone), Counter[str]())
    del coverage.dropped_a[TEMPLATE], swapped.dropped_b[TEMPLATE]
    assert coverage.dropped_a == reasons == swapped.dropped_b


def test_lone_surrogates_do_not_break_a_chat(chatty: Chatty) -> None:
    a, b = chatty["byte_bpe", "chatml"], chatty["sentencepiece_bpe", "gemma"]
    assert chat_segments(a, b, [user("a\ud800b")])[0]


def test_a_pair_of_models_cuts_a_chat_as_its_tokenizers_do(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.a.tokenizer, "chat_template", CHATML)
    monkeypatch.setattr(pair.b.tokenizer, "chat_template", GEMMA)
    segments, coverage = pair.chat_segments(QUESTION)
    assert (segments, coverage) == chat_segments(pair.a.tokenizer, pair.b.tokenizer, QUESTION)
    (acts,) = pair.activations([[pair.bos_segment, *segments]])
    assert acts.shape == (len(segments) + 1, 40)


def test_a_tokenizer_without_a_chat_template_is_named(
    tokenizers: dict[str, PreTrainedTokenizerBase], chatty: Chatty
) -> None:
    with pytest.raises(ValueError, match=r"byte_bpe' has no chat template. Give one as chat_te"):
        chat_segments(chatty["byte_bpe", "llama"], tokenizers["byte_bpe"], QUESTION)


def test_a_template_that_refuses_a_role_is_quoted(chatty: Chatty) -> None:
    tokenizer = copy.deepcopy(chatty["byte_bpe", "gemma"])
    tokenizer.chat_template = "{{ raise_exception('No system role') }}"
    with pytest.raises(ValueError, match=r"refuses messages of the roles user: No system role"):
        chat_segments(tokenizer, tokenizer, [user("Hi")])


@pytest.mark.parametrize(
    ("messages", "given"),
    [
        ("Hi", "got 'Hi'"),
        ([], r"got \[\]"),
        ([user("x"), "Hi"], "message 1 is 'Hi'"),
        ([{"role": "user"}], r"message 0 is {'role': 'user'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 is {'role': 'user', 'con"),
        ([user("x" * 500)] + [{"content": "x" * 500}], "message 1 is {'content': 'xxx.*x…"),
    ],
)
def test_what_is_no_chat_is_refused_with_what_was_given(messages: Any, given: str) -> None:
    with pytest.raises(ValueError, match=f"A chat is a list of messages.*{given}"):
        check_messages(messages)


def test_a_contrastive_row_gives_both_answers_to_the_prompt() -> None:
    row = {"prompt": "Hi", "completion_a": "A says", "completion_b": "B says"}
    assert list(contrastive_documents(row)) == [
        [user("Hi"), assistant("A says")],
        [user("Hi"), assistant("B says")],
    ]


def test_a_row_without_completions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"completion_b is None, among the columns \['prompt', "):
        list(contrastive_documents({"prompt": "Hi", "completion_a": "x"}))
