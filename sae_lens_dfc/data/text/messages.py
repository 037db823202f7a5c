"""Converts the chat formats of data sets to messages with a role and text content."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_dfc.data.text.cleaning import clean

WANTED = "A chat is a list of messages, each a mapping with strings 'role' and 'content'"
# ShareGPT's roles and their names in chat templates.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "system": "system"}
OF_TOOLS = {"tool", "function", "ipython", "tool_call", "tool_response", "function_call"}
OF_TOOLS |= {"function_response", "observation"}
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = {"text", "input_text", "output_text"}
ONLY_TEXT = (
    "only text is read of a chat. Leave such chats out, or raise max_unreadable of their source."
)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Check the messages of a chat and convert them to one format that every tokenizer accepts.

    A message has a `role` and a `content`, or ShareGPT's `from` and `value` (human, gpt, system).
    Its content is text, or a list of parts that are text (`[{"type": "text", "text": …}]`), which
    are joined. Other keys are kept, except those without a value, which some file formats add to
    every message.

    Raises:
        ValueError: The value is not a list of such messages, or is empty; or a message calls a
            tool, is a tool's answer, or contains an image.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    >>> check_messages([{"from": "gpt", "value": "Hi"}])
    [{'role': 'assistant', 'content': 'Hi'}]
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{WANTED}; got {shortened(messages)}. Give such a list.")
    return [_message(i, message) for i, message in enumerate(messages)]


def shortened(value: Any) -> str:
    """The `repr` of a value, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{WANTED}; message {i} is {shortened(message)}. Give a mapping in its place."
        )
    given = {name: value for name, value in message.items() if _has_value(value)}
    is_sharegpt = "from" in given and "role" not in given
    said_by, said = ("from", "value") if is_sharegpt else ("role", "content")
    role, content = given.pop(said_by, None), given.pop(said, None)
    _check_tools(i, role, given)
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = _joined(i, content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{WANTED}; message {i} is {shortened(message)}. Give both as strings.")
    role = _role(i, role) if is_sharegpt else role
    return {"role": role, "content": clean(content), **given}


def _has_value(value: Any) -> bool:
    """Whether a value is neither None nor a mapping of only None: file formats in which all
    messages have the same keys add such values."""
    if isinstance(value, Mapping):
        return any(map(_has_value, value.values()))
    return value is not None


def _check_tools(i: int, role: Any, given: dict[str, Any]) -> None:
    for name in CALLS:
        if given.pop(name, None):
            raise ValueError(f"Message {i} calls a tool ({name}), and {ONLY_TEXT}")
    if isinstance(role, str) and role in OF_TOOLS:
        raise ValueError(f"Message {i} is of a tool (role {role!r}), and {ONLY_TEXT}")


def _role(i: int, role: str) -> str:
    if role not in ROLES:
        raise ValueError(
            f"Message {i} is from {role!r:.80}, which is none of {', '.join(ROLES)}. Rename it, or leave such chats out."
        )
    return ROLES[role]


def _joined(i: int, parts: Sequence[Any]) -> str | None:
    """The joined text of a content's parts; None if they are not parts."""
    if not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts):
        return None
    for kind in (part["type"] for part in parts):
        if kind not in TEXT_PARTS:
            raise ValueError(f"Message {i} has a part of type {kind!r:.80}, and {ONLY_TEXT}")
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None
