"""Reads untrusted text, JSON and YAML files with bounded memory and without running code.

Any problem with a file raises a one-line ValueError, before memory is allocated for what the file
claims to hold.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override
from yaml import MarkedYAMLError
from yaml.composer import ComposerError

from sae_lens_dfc.core.terminal import said_by

MAX_JSON = 8_000_000
"""Maximum size of a JSON file in bytes; as Python objects it can take 25 times as much."""
MAX_YAML = 100_000
"""Maximum size of a YAML file in bytes; the parser is pure Python and takes seconds per
megabyte."""
MAX_YAML_VALUES = 2_000
"""Maximum number of values in a YAML file, including keys and lists; each takes 0.1 ms on a slow
processor."""
MAX_DEPTH = 40
"""Maximum nesting depth, because settings are processed recursively."""


def read_text(path: Path, max_bytes: int) -> str:
    """Read a text file of at most `max_bytes`.

    Raises:
        ValueError: It is larger, not UTF-8 text, or not a regular file (a device may never end).
        OSError: It does not exist or cannot be read.
    """
    if not path.stat() or not path.is_file():
        raise ValueError(f"{path} is not a file.")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes; no file of its kind has more than {max_bytes:,}."
        )
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}."
        ) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str, finite: bool = True) -> Any:
    """Parse JSON without duplicate keys, integers of more than 64 bits, or excessive nesting.

    Args:
        text: JSON.
        finite: Whether to refuse NaN and infinity, which are not valid JSON.

    Raises:
        ValueError: The text is not such JSON.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: 'a' appears twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep.") from None
    _check_values(value, finite)
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON, finite: bool = True) -> Any:
    """Read a JSON file, see `parse_json`.

    Raises:
        ValueError: The file is not valid JSON, or is too large.
        OSError: It does not exist or cannot be read.
    """
    text = read_text(path, max_bytes)
    try:
        return parse_json(text, finite)
    except ValueError as error:
        raise ValueError(f"{path} is not sound JSON: {said_by(error)}") from None


def read_object(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """Read the object that a JSON file holds.

    Raises:
        ValueError: The file holds anything else.
        OSError: It does not exist or cannot be read.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {value!r:.80}.")
    return value


def read_yaml(path: Path) -> Any:
    """Read a YAML file without duplicate keys or aliases, which can expand a kilobyte to gigabytes.

    Raises:
        ValueError: The file has one of these, is not valid YAML, or is too large.
        OSError: It does not exist or cannot be read.
    """
    text = read_text(path, MAX_YAML)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not sound YAML: {said_by(error)}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML, see `read_yaml`.

    Raises:
        ValueError: The text is not valid YAML, or has a duplicate key or an alias.
    """
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        _check_values(value, finite=False)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{place}{error.problem or error.context}.") from None
    # PyYAML also lets through any error that its conversions raise.
    except Exception as error:
        raise ValueError(said_by(error)) from None
    return value


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases and duplicate keys, for at most `MAX_YAML_VALUES`
    values."""

    n_values = 0

    @override
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.n_values += 1
        if self.n_values > MAX_YAML_VALUES:
            raise ComposerError(
                None,
                None,
                f"more than {MAX_YAML_VALUES:,} values; no file of its kind has more",
                event.start_mark,
            )
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(
                None,
                None,
                f"*{event.anchor} repeats a part by name; write it out",
                event.start_mark,
            )
        return super().compose_node(parent, index)

    @override
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        _unique(
            [(key.value if isinstance(key.value, str) else None, None) for key, _ in node.value]
        )
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Build a mapping, raising an error on a duplicate key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set[Any]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r:.80} appears twice.")
    return values


def _check_values(value: Any, finite: bool) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                following.extend(one.values())
            elif isinstance(one, list | tuple | set):
                following.extend(one)
            elif isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise ValueError("it has a whole number of more than 64 bits.")
            elif finite and isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"it has {one}, which is no number.")
        if not following:
            return
        level = following
    raise ValueError("it is nested too deep.")
