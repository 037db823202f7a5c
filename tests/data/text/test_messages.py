from typing import Any

import pytest

from sae_lens_dfc.data.text.messages import check_messages


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def contents(*messages: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in check_messages(list(messages))]


def test_a_content_in_parts_is_the_text_of_its_parts() -> None:
    assert contents(user(parts("a ", "b")), user(parts("c")), user([])) == [
        ("user", "a b"),
        ("user", "c"),
        ("user", ""),
    ]
    with_none = [{"type": "text", "text": "a", "image_url": None}]
    assert contents(user(with_none)) == [("user", "a")]


def test_sharegpts_messages_are_the_same_with_other_names() -> None:
    said = [("system", "Be kind."), ("human", "Who?"), ("gpt", "The cat."), ("human", "Why?")]
    assert contents(*({"from": by, "value": what} for by, what in said)) == [
        ("system", "Be kind."),
        ("user", "Who?"),
        ("assistant", "The cat."),
        ("user", "Why?"),
    ]


def test_roles_of_the_usual_form_are_the_templates_own() -> None:
    assert contents({"role": "human", "content": "a"}) == [("human", "a")]


def test_a_speaker_that_nobody_knows_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="Message 1 is from 'bing', which is none of human, gpt, "):
        check_messages([{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}])


def test_keys_without_a_value_are_none_and_others_are_kept() -> None:
    empty = {"name": None, "tool_calls": None, "function_call": {"name": None, "arguments": None}}
    assert check_messages([user("a", **empty, weight=0, from_=None)]) == [user("a", weight=0)]
    assert check_messages([user("a", tool_calls=[])]) == [user("a")]
    assert check_messages([user("a", name="Ann")]) == [user("a", name="Ann")]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
NO_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "a call": ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "calls a tool (tool_"),
    "a call with text": (
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]},
        "calls a tool (tool_calls)",
    ),
    "an old call": (
        {"role": "assistant", "content": None, "function_call": {"name": "f"}},
        "calls a tool (function_call)",
    ),
    "a tool's answer": ({"role": "tool", "content": "3"}, "is of a tool (role 'tool')"),
    "ShareGPT's call": ({"from": "function_call", "value": "{}"}, "(role 'function_call')"),
    "ShareGPT's answer": ({"from": "observation", "value": "3"}, "is of a tool (role 'observation"),
    "a picture": (user([{"type": "image"}, *parts("What?")]), "has a part of type 'image'"),
    "a picture's address": (
        user([*parts("What?"), {"type": "image_url", "image_url": {"url": "x"}}]),
        "has a part of type 'image_url'",
    ),
    "sound": (user([{"type": "input_audio", "input_audio": {}}]), "part of type 'input_audio'"),
}


@pytest.mark.parametrize("what", NO_TEXT)
def test_what_is_no_text_in_a_chat_is_refused_by_name(what: str) -> None:
    message, why = NO_TEXT[what]
    with pytest.raises(ValueError) as error:
        check_messages([user("Hi"), message])
    assert str(error.value).startswith("Message 1 ") and why in str(error.value)
    assert str(error.value).endswith(", or raise max_unreadable of their source.")


@pytest.mark.parametrize(
    "content",
    [None, 3, {"text": "a"}, ["a"], [{"text": "a"}], [{"type": "text"}], [{"type": 3, "text": ""}]],
)
def test_a_message_that_says_nothing_readable_is_shown(content: Any) -> None:
    with pytest.raises(ValueError, match="A chat is a list of messages.*message 1 is {'role': 'u"):
        check_messages([user("Hi"), user(content)])
    with pytest.raises(ValueError, match="message 0 is {'from': 'human', 'value': "):
        check_messages([{"from": "human", "value": content}])
