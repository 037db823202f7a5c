"""Builds dataclasses from plain values of JSON and YAML, and merges nested settings."""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by

T = TypeVar("T")
Extra = Literal["forbid", "ignore"]


def from_plain(cls: type[T], values: Any, what: str, extra: Extra = "forbid") -> T:
    """Build a dataclass, and those in it, from plain values: each of its field's type, unconverted.

    Args:
        cls: The dataclass.
        values: Its fields by name, as JSON or YAML gives them.
        what: Name of the object in messages.
        extra: Whether unknown fields are refused or left out.

    Raises:
        ValueError: A field is missing, unknown or of another type, or the dataclass refuses its
            value.
    """
    try:
        text = json.dumps([values], ensure_ascii=False)
        [made] = _reader(cls, extra).validate_json(text.translate(_AWAY))
    except ValidationError as error:
        raise ValueError(_first_of(error, values, what)) from None
    except TypeError as error:
        raise ValueError(f"{what} cannot be written as JSON: {said_by(error)}") from None
    return made if text == text.translate(_AWAY) else _back(made)


# Lone surrogates, which names of files may hold and pydantic does not read, stand meanwhile at the
# end of the private characters.
_AWAY = {code: code + 0x102000 for code in range(0xD800, 0xE000)}
_BACK = {code: surrogate for surrogate, code in _AWAY.items()}


def _back(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_BACK)
    if isinstance(value, list):
        return [_back(one) for one in value]
    if isinstance(value, dict):
        return type(value)({_back(key): _back(one) for key, one in value.items()})
    if is_dataclass(value):
        for name, one in vars(value).items():
            object.__setattr__(value, name, _back(one))
    return value


@cache
def _reader(cls: type[Any], extra: Extra) -> Any:
    # A configuration cannot be given for a dataclass alone, only for what it is in.
    config = ConfigDict(strict=True, extra=extra, arbitrary_types_allowed=True)
    return TypeAdapter(tuple[cls], config=config)  # type: ignore[valid-type]


def _first_of(error: ValidationError, values: Any, what: str) -> str:
    """The first problem, as one sentence."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path, kind, name = _path(first, values), first["type"], _back(first["loc"][-1])
    where = f"{what}: {path:.200}" if path else what
    if kind == "missing":
        return f"{where} has no {name!r}."
    if kind == "unexpected_keyword_argument":
        return f"{where} has a setting {name!r:.80}, which this version does not know."
    if kind == "value_error":
        said = said_by(first.get("ctx", {})["error"], MOST_OF_OURS)
        return f"{path:.200}: {said}" if path else said
    alike = [problem["msg"] for problem in problems if _path(problem, values) == path]
    wanted = " or ".join(said.removeprefix("Input should be ") for said in alike)
    return f"{where} must be {wanted}, and is {_back(first['input'])!r:.80}."


def _path(problem: Mapping[str, Any], values: Any) -> str:
    """The names that lead to a value, without the members of a union, which pydantic adds."""
    names: list[str] = []
    is_of_a_name = problem["type"] in ("missing", "unexpected_keyword_argument")
    for key in problem["loc"][1 : -1 if is_of_a_name else None]:
        if isinstance(values, dict | list):
            names.append(str(key))
            values = values[key]  # type: ignore[index]
    return ".".join(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same_structure(one: Any, other: Any) -> bool:
    """Whether two JSON values have the same structure: the same keys, and values of the same types,
    with int and float alike.

    >>> same_structure({"a": [1, 2.0]}, {"a": (3, 4)}), same_structure({"a": 1}, {"a": "1"})
    (True, False)
    """
    if isinstance(other, dict):
        return (
            isinstance(one, dict)
            and one.keys() == other.keys()
            and all(same_structure(one[name], other[name]) for name in other)
        )
    if isinstance(other, list | tuple):
        return (
            isinstance(one, list | tuple)
            and len(one) == len(other)
            and all(map(same_structure, one, other))
        )
    return _is_number(one) if _is_number(other) else isinstance(one, type(other))


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into nested settings.

    >>> merge({"sae": {"k": 1, "d_sae": 8}, "lr": 1}, {"sae": {"k": 2}})
    {'sae': {'k': 2, 'd_sae': 8}, 'lr': 1}
    """
    merged = dict(settings)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names.

    >>> flattened({"sae": {"k": 2}, "lr": 1})
    {'sae.k': 2, 'lr': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


_BOUNDS: dict[str, Callable[[Any, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


def require(cfg: object, names: Sequence[str], bounds: str = "above 0 and finite") -> None:
    """Raise ValueError for the first of these settings that is set and not within the bounds.

    Args:
        cfg: Has the settings as attributes.
        names: Of the settings.
        bounds: In words, joined by "and": at least N, above N, at most N, below N, finite.
    """
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not all(_is_within(value, one) for one in bounds.split(" and ")):
            wanted = bounds.removesuffix(" and finite") if math.isfinite(value) else bounds
            raise ValueError(f"{name} must be {wanted}, got {value}.")


def _is_within(value: float, bound: str) -> bool:
    words, _, limit = bound.rpartition(" ")
    return _BOUNDS[words](value, float(limit)) if words else math.isfinite(value)


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not accept.

    Raises:
        ValueError: The seed takes more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be a number of 64 bits, got {seed}.")
