"""Aligns a chat rendered in two chat templates, at positions inside its messages."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.alignment.align import (
    ALTERED,
    TEMPLATE,
    Coverage,
    aligned_positions,
    count,
    cut,
)
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.alignment.tokens import Tokens, tokenize
from sae_lens_dfc.data.text.messages import check_messages, shortened


def chat_segments(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
) -> tuple[Segments, Coverage]:
    """Render a chat in each model's template and cut it into segments that end inside messages.

    At a pair, both models have read the same characters of a message, apart from leading whitespace
    that one template strips. A message that one template drops, moves or changes other than at its
    ends is read but has no pairs. Template tokens belong to the segment of the next pair; those
    after the last pair are dropped.

    Args:
        tokenizer_a: A's tokenizer, with a chat template.
        tokenizer_b: B's.
        messages: Mappings with `role` and `content`, in order, in any format that `check_messages`
            accepts. Other keys are passed to the templates unchanged.

    Returns:
        Segments, without the beginning-of-sequence token that a template may start with, and the
        coverage.

    Raises:
        ValueError: The messages are malformed, or a tokenizer has no chat template or one that
            rejects them.
    """
    chat = check_messages(messages)
    a = _read(tokenizer_a, chat)
    b = a if tokenizer_a is tokenizer_b else _read(tokenizer_b, chat)
    shared = _shared(a, b)
    pairs: list[tuple[int, int]] = []
    coverage = Coverage()
    for in_a, in_b in shared.values():
        first_a, part_a = _part(a, in_a)
        first_b, part_b = _part(b, in_b)
        part_pairs = aligned_positions(part_a, part_b)
        coverage.add(count(part_a, part_b, part_pairs))
        pairs += [(first_a + i, first_b + j) for i, j in part_pairs]
    outside_a = _outside(a, shared, n_inside=coverage.tokens_a)
    outside_b = _outside(b, shared, n_inside=coverage.tokens_b)
    coverage.add(
        Coverage(outside_a.total(), outside_b.total(), dropped_a=outside_a, dropped_b=outside_b)
    )
    # Each context already starts with the model's beginning-of-sequence token
    # (`ModelPair.bos_segment`), so the template's is dropped.
    pairs = [(i - a.n_bos, j - b.n_bos) for i, j in pairs]
    return cut(a.tokens.ids[a.n_bos :], b.tokens.ids[b.n_bos :], pairs), coverage


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
) -> str:
    """Render messages in the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Messages as `check_messages` returns them.
        add_generation_prompt: Whether to append the template's generation prompt.

    Raises:
        ValueError: The tokenizer has no chat template, or the template rejects these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"Tokenizer {tokenizer.name_or_path!r} has no chat template. Give one as chat_template in its "
            "model's ModelConfig: a Jinja template, or a file that holds one."
        )
    chat = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        roles = ", ".join(message["role"] for message in chat)
        raise ValueError(
            f"The chat template of tokenizer {tokenizer.name_or_path!r} refuses messages of the roles {roles}: "
            f"{said_by(error)} Leave out what it cannot take, or give another as chat_template in ModelConfig."
        ) from error


def n_leading_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """1 when the tokens start with the tokenizer's beginning-of-sequence token, else 0."""
    return int(len(ids) > 0 and ids[0] == tokenizer.bos_token_id)


def contrastive_documents(row: Mapping[str, Any]) -> Iterator[list[dict[str, str]]]:
    """The two chats of a row from `sae-lens-dfc generate`: the prompt with A's answer, and with
    B's.

    Both models read both, as in the data of the delta crosscoder (arXiv 2603.04426).

    Raises:
        ValueError: The row lacks one of the columns.

    >>> row = {"prompt": "Hi", "completion_a": "Hello!", "completion_b": "Yes?"}
    >>> [chat[1]["content"] for chat in contrastive_documents(row)]
    ['Hello!', 'Yes?']
    """
    for name in ("prompt", "completion_a", "completion_b"):
        if not isinstance(row.get(name), str):
            raise ValueError(
                f"A contrastive row has the texts prompt, completion_a and completion_b; {name} is "
                f"{shortened(row.get(name))}, among the columns {list(row)}. Make rows with sae-lens-dfc generate."
            )
    for name in ("completion_a", "completion_b"):
        yield [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row[name]},
        ]


class Content(NamedTuple):
    """The span of a message's content in a rendering; a template may have stripped whitespace at
    its ends."""

    offset: int
    """Position in the rendering of the content's first character, even if it was stripped."""
    start: int
    """Index of the first character of the content that was rendered."""
    end: int


class _Reading(NamedTuple):
    """A chat as one model reads it."""

    tokens: Tokens
    """Tokens of the rendering."""
    n_bos: int
    """Beginning-of-sequence tokens at its start, 0 or 1."""
    contents: list[Content | None]
    """Each message's content, or None if the template drops or alters it."""


def _read(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]]) -> _Reading:
    rendering = render_chat(tokenizer, chat)
    tokens = tokenize(tokenizer, rendering)
    contents = [locate(tokenizer, chat, i, rendering) for i in range(len(chat))]
    return _Reading(tokens, n_leading_bos(tokenizer, tokens.ids), contents)


def locate(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], i: int, rendering: str
) -> Content | None:
    """Find the content of message `i` in the chat's rendering; None if the template drops or alters
    it."""
    # The content's text may also occur in other messages or in the template, so it cannot be
    # searched for. Instead the chat is rendered with a marker in its place, and the content is what
    # remains between the same text before and after.
    mark = "\ue000\ue001"
    while mark in rendering:
        mark = f"\ue000{mark}"
    try:
        marked = render_chat(tokenizer, [*chat[:i], {**chat[i], "content": mark}, *chat[i + 1 :]])
    except ValueError:
        return None  # the template inspects contents, and accepts this one but not the marker
    before, found, after = marked.partition(mark)
    end = len(rendering) - len(after)
    unchanged = rendering.startswith(before) and rendering.endswith(after) and len(before) <= end
    if not found or not unchanged:
        return None
    content, there = chat[i]["content"], rendering[len(before) : end]
    start = _indent(content) - _indent(there)
    if start < 0 or content[start:][: len(there)] != there or content.strip() != there.strip():
        return None
    return Content(len(before) - start, start, start + len(there))


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _shared(a: _Reading, b: _Reading) -> dict[int, tuple[Content, Content]]:
    """The messages that both renderings have in the same order, by number, with the span of their
    common characters in A and in B."""
    shared: dict[int, tuple[Content, Content]] = {}
    limit_a = limit_b = inf
    # From last to first, because the message that a template moves is the system prompt.
    for i in reversed(range(len(a.contents))):
        in_a, in_b = a.contents[i], b.contents[i]
        if in_a is None or in_b is None:
            continue
        if in_a.offset + in_a.end > limit_a or in_b.offset + in_b.end > limit_b:
            continue
        limit_a, limit_b = in_a.offset + in_a.start, in_b.offset + in_b.start
        start, end = max(in_a.start, in_b.start), min(in_a.end, in_b.end)
        shared[i] = in_a._replace(start=start, end=end), in_b._replace(start=start, end=end)
    return dict(reversed(shared.items()))


def _inside(reading: _Reading, content: Content) -> range:
    """Positions of the tokens that lie entirely inside the content."""
    tokens = reading.tokens
    start, end = content.offset + content.start, content.offset + content.end
    reach = list(accumulate(tokens.ends, max))
    first, stop = bisect_right(reach, start), bisect_right(reach, end)
    # Judged by the end of the previous token, because some tokenizers omit a token's space from its
    # span.
    whole_before = reach[first - 1] == start and tokens.whole[first - 1] if first else start == 0
    first = max(first if whole_before else first + 1, reading.n_bos)
    return range(first, max(first, stop))


def _part(reading: _Reading, content: Content) -> tuple[int, Tokens]:
    """The first position inside the content, and its tokens, with ends counted from the content's
    start."""
    positions = _inside(reading, content)
    part = slice(positions.start, positions.stop)
    tokens, start = reading.tokens, content.offset + content.start
    ends = [end - start for end in tokens.ends[part]]
    return positions.start, Tokens(tokens.ids[part], ends, tokens.whole[part], tokens.strings[part])


def _outside(reading: _Reading, shared: Container[int], n_inside: int) -> Counter[str]:
    """Tokens outside the shared messages, by reason."""
    n_tokens = len(reading.tokens.ids) - reading.n_bos - n_inside
    others = (c for i, c in enumerate(reading.contents) if c is not None and i not in shared)
    altered = sum(len(_inside(reading, content)) for content in others)
    return +Counter({ALTERED: altered, TEMPLATE: n_tokens - altered})
