"""Defines switches, command-line flags without a value."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from simple_parsing import field

ACTION = "store_true"


def switch() -> Any:
    """A dataclass field that is False, and True if its flag is given."""
    return field(default=False, action=ACTION)


def switches_of(options: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the switches of a dataclass and of those inside it.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     overwrite: bool = switch()
    >>> list(switches_of(Options))
    ['overwrite']
    """
    for one in fields(options):
        if one.metadata.get("custom_args", {}).get("action") == ACTION:
            yield prefix + one.name
        elif isinstance(one.type, type) and is_dataclass(one.type):
            yield from switches_of(one.type, f"{prefix}{one.name}.")
