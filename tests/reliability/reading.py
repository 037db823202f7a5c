"""What a model has read after each token of a text, found without the tokenizer's map back to it.

The tokens' spellings are put together to bytes of the normalized text. Which part of the text
itself that is, is found by normalizing every beginning of it, one after another: slow, and with
nothing in common with what it is to check.
"""

import json
import re
import unicodedata
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.data.alignment.tokens import Tokens, tokenize

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_LETTER = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


class Reading(NamedTuple):
    """One text in one tokenizer."""

    tokens: Tokens
    """As the package sees it."""
    raw_ends: list[int]
    """Where the tokenizers library says each token ends."""
    read: list[bytes]
    """What the model has read after each token, of its normalized text."""
    ends: list[set[int]]
    """After how many bytes of the text that is so: several where it drops characters, none inside a
    character that it takes apart."""
    inside: list[set[tuple[int, bytes]]]
    """The same for tokens that end inside a character that it takes apart: the bytes before it, and
    what is read of it."""
    new: list[bool]
    """Whether the token holds anything of the text, rather than a space that the tokenizer puts in
    front of it."""
    unsure: set[int]
    """Bytes after which a mark follows that this model's normalizer may join with what is before,
    and those inside a
    character some of whose bytes it drops: there pairs may be missing."""
    borders: set[int]
    """After how many bytes a character of the text ends."""


class Reader:
    """A tokenizer, to be read by its spellings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.raw: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        spec: dict[str, Any] = json.loads(self.raw.to_str())
        pre: dict[str, Any] = spec["pre_tokenizer"] or {"type": None}
        self.is_byte_level = pre["type"] == "ByteLevel"
        self.is_wordpiece = spec["model"]["type"] == "WordPiece"
        self.is_metaspace = pre["type"] == "Metaspace"
        self.puts_space_first = self.is_metaspace or bool(pre.get("add_prefix_space"))
        self.joins = (spec["normalizer"] or {}).get("type") not in (None, "Replace")
        self.unknown = {spec["model"].get("unk_token"), spec["model"].get("unk_id")}
        if spec["model"].get("unk_id") is not None:
            self.unknown.add(spec["model"]["vocab"][spec["model"]["unk_id"]][0])
        added = sorted((t["content"] for t in spec["added_tokens"]), key=len, reverse=True)
        self.added = set(added)
        self.parting = re.compile(f"({'|'.join(map(re.escape, added))})")
        letters = BYTE_OF_LETTER.items() if self.is_byte_level else []
        # A vocabulary without some of the bytes, such as SmolLM2's, drops these.
        known: dict[str, int] = self.raw.get_vocab()
        self.dropped = bytes(byte for letter, byte in letters if letter not in known)
        spec |= {"normalizer": None, "added_tokens": [], "post_processor": None}
        self.bare = Tokenizer.from_str(json.dumps(spec))

    def normal(self, section: str) -> str:
        """What the model's vocabulary is to spell, of text without added tokens."""
        if self.raw.normalizer is not None:
            section = self.raw.normalizer.normalize_str(section)
        return section.replace(" ", "▁") if self.is_metaspace else section

    def shown(self, text: str) -> bytes:
        """What is read of all this text."""
        parts = (p if p in self.added else self.normal(p) for p in self.parting.split(text))
        return self.trimmed("".join(parts).encode().translate(None, self.dropped))

    def trimmed(self, read: bytes) -> bytes:
        # Words do not say what space follows them.
        return read.rstrip(b" ") if self.is_wordpiece else read

    def read(self, text: str) -> Reading:
        tokens = tokenize(self.tokenizer, text)
        raw = self.raw.encode(text, add_special_tokens=False)
        assert raw.ids == list(tokens.ids)
        read, ids = list[bytes](), list[int | None]()
        before = b""
        for part in self.parting.split(text):
            if part in self.added:
                ids.append(self.raw.token_to_id(part))
                before += part.encode()
                read.append(before)
            elif part:
                in_part, ids_in_part = self._section(part)
                read += (before + n for n in in_part)
                ids += ids_in_part
                before += self.normal(part).encode().translate(None, self.dropped)
        # The oracle knows what it reads, or says that it does not.
        assert ids == raw.ids, (ids, raw.ids)
        read = [self.trimmed(n) for n in read]
        ends = self._states(text)
        raw_ends = [end for _, end in raw.offsets]
        found = [ends.get(n, set[int]()) for n in read]
        inside = [
            set[tuple[int, bytes]]() if found else _inside(n, ends)
            for n, found in zip(read, found, strict=True)
        ]
        new = [n != m for n, m in zip(read, [b"", *read], strict=False)]
        borders = set(accumulate((len(c.encode()) for c in text), initial=0))
        return Reading(tokens, raw_ends, read, found, inside, new, self._unsure(text), borders)

    def _section(self, section: str) -> tuple[list[bytes], list[int]]:
        normal = self.normal(section)
        in_front = ""
        space = "▁" if self.is_metaspace else " "
        if self.puts_space_first and normal and not normal.startswith(space):
            in_front = space
        encoding = self.bare.encode(
            normal.replace("▁", " ") if self.is_metaspace else normal, add_special_tokens=False
        )
        whole = (in_front + normal).encode().translate(None, self.dropped)
        read, n = list[bytes](), 0
        for spelled, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            if self.is_byte_level:
                n += len(spelled)
                assert whole[:n].endswith(bytes(BYTE_OF_LETTER[letter] for letter in spelled))
            elif self.is_wordpiece or spelled in self.unknown:
                n = len((in_front + normal[:end]).encode())
            elif re.fullmatch("<0x..>", spelled) and normal[start:end] != spelled:
                assert whole[n] == int(spelled[3:5], 16)
                n += 1
            else:
                n += len(spelled.encode())
                assert whole[:n].endswith(spelled.encode())
            read.append(whole[len(in_front.encode()) : max(n, len(in_front.encode()))])
        assert self.is_wordpiece or n == len(whole), "the tokens do not spell the text"
        return read, encoding.ids

    def _states(self, text: str) -> dict[bytes, set[int]]:
        """What is read, after how many bytes of the text."""
        states: dict[bytes, set[int]] = {}
        n, before = 0, self.shown("")
        for i, character in enumerate(text):
            spelled, after = character.encode(), self.shown(text[: i + 1])
            states.setdefault(before, set()).add(n)
            kept = [spelled[:k].translate(None, self.dropped) for k in range(1, len(spelled) + 1)]
            if after == before + kept[-1]:
                for k, part in enumerate(kept, start=1):
                    states.setdefault(before + part, set()).add(n + k)
            n, before = n + len(spelled), after
        states.setdefault(before, set()).add(n)
        return states

    def _unsure(self, text: str) -> set[int]:
        unsure, n = set[int](), 0
        for character, following in zip(text, text[1:] + " ", strict=False):
            spelled = character.encode()
            end = n + len(spelled)
            if self.joins and may_be_mark(character):
                unsure |= set(range(n, end))
            if self.joins and may_be_mark(following):
                unsure |= set(range(n, end + 1))
            if spelled.translate(None, self.dropped) != spelled:
                unsure |= set(range(n + 1, end))
            n = end
        return unsure


def _inside(read: bytes, states: dict[bytes, set[int]]) -> set[tuple[int, bytes]]:
    longest = next((k for k in range(len(read), -1, -1) if read[:k] in states), None)
    return set() if longest is None else {(end, read[longest:]) for end in states[read[:longest]]}


def may_be_mark(character: str) -> bool:
    """Whether normalizing may join this character, or one behind it, with the one before it."""
    first = unicodedata.normalize("NFKD", character)[0]
    is_korean = "HANGUL" in unicodedata.name(first, "")
    is_mark = unicodedata.category(first)[0] in "MC" and not first.isspace()
    return is_korean or is_mark or first == "\ufffd"
