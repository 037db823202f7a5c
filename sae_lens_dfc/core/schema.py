"""Checks plain values against a dataclass's types, and merges nested settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    Union,  # noqa: TID251  (what older annotations of SAELens are made of)
    get_args,
    get_origin,
    get_type_hints,
)

from sae_lens_dfc.core.parsing import T, _named


def from_plain(cls: type[T], values: Any, what: str) -> T:
    """Build a dataclass from plain values, with the right type for each field and no unknown
    fields.

    Args:
        cls: The dataclass.
        values: Its fields by name; nested dataclasses must already be built.
        what: Name of the object in messages.

    Raises:
        ValueError: A field is missing, unknown or of another type, or the dataclass refuses its
            value.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping of settings, and is {_named(values)}.")
    own = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in own]
    if unknown:
        raise ValueError(
            f"{what} has a setting {unknown[0]!r:.80}, which this version does not know."
        )
    missing = [
        n for n, f in own.items() if n not in values and f.default is f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{what} has no {missing[0]!r}.")
    check_types(cls, values, what)
    return cls(**values)


def check_types(cls: type, values: Mapping[str, Any], what: str) -> None:
    """Refuse a value of another type than its field's; names that are not fields are ignored.

    Raises:
        ValueError: A value has the wrong type.
    """
    for name, hint in get_type_hints(cls).items():
        if name in values and not _fits(values[name], hint):
            said = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            raise ValueError(f"{what}: {name} must be {said}, and is {values[name]!r:.80}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(one, args[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, args[1]) for one in value.values())
    if hint is Any:
        return True
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (None, NoneType):
        return value is None
    # In Python 3.10 a parametrized type, such as tuple[int, int], is itself a type to isinstance.
    return origin is not None or not isinstance(hint, type) or isinstance(value, hint)


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


def require_positive(cfg: object, names: Sequence[str]) -> None:
    """Raise ValueError for the first of these settings that is set and not a finite number above
    0."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
        if value is not None and value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}. Give a large number.")


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not accept.

    Raises:
        ValueError: The seed takes more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be a number of 64 bits, got {seed}.")
