"""Files that somebody else may have written: read without running, believing or obeying them.

Whatever is wrong with one is a ValueError of one line, before memory is taken for what the file only claims to hold.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,  # noqa: TID251  (what older annotations of SAELens are made of)
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from safetensors import SafetensorError, safe_open
from typing_extensions import override
from yaml.composer import ComposerError

MAX_JSON = 8_000_000
"""Bytes of a JSON file: as objects they can be 25 times as much."""
MAX_YAML = 100_000
"""Bytes of a YAML file: it is read by Python itself, which takes seconds for a megabyte."""
MAX_DEPTH = 40
"""Levels of nesting: what handles settings calls itself for each."""
MAX_HEADER = 1_000_000
"""Bytes of a safetensors file's header, where it names a few tensors."""

T = TypeVar("T")


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file that is no larger than that.

    Raises:
        ValueError: It is larger, no text, or no file (a device never ends).
        OSError: It is not there or cannot be read.
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
        raise ValueError(f"{path} is not text: {error}.") from None


def parse_json(text: str, finite: bool = True) -> Any:
    """What JSON says, if it says it once, in numbers of 64 bits, and not nested out of all measure.

    Args:
        text: JSON.
        finite: Whether to refuse NaN and infinity, which are no JSON.

    Raises:
        ValueError: It does not.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: 'a' is there twice
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_values(value, finite)
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON, finite: bool = True) -> Any:
    """What a JSON file says, see `parse_json`.

    Raises:
        ValueError: The file is not JSON, or larger than any of its kind.
        OSError: It is not there or cannot be read.
    """
    text = read_text(path, max_bytes)
    try:
        return parse_json(text, finite)
    except ValueError as error:
        raise ValueError(f"{path} is not sound JSON: {error}.") from None


def read_object(path: Path, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: It holds none.
        OSError: The file is not there or cannot be read.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {_named(value)}.")
    return value


def read_yaml(path: Path) -> Any:
    """What a YAML file says, if it says each key once, and does not repeat a part by its name: that lets a kilobyte stand for gigabytes.

    Raises:
        ValueError: It does, or is not YAML, or larger than any of its kind.
        OSError: It is not there or cannot be read.
    """
    text = read_text(path, MAX_YAML)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not sound YAML: {error}.") from None


def parse_yaml(text: str) -> Any:
    """What YAML says, see `read_yaml`.

    Raises:
        ValueError: It is not YAML, says a key twice, or repeats a part by its name.
    """
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        _check_values(value, finite=False)
    # Beside its own errors it lets through whatever its conversions raise.
    except Exception as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    return value


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, and with a rule against a key that is there twice."""

    @override
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
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
    """A mapping of these pairs; its caller may only be interested in that they make one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set[Any]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r:.80} is there twice")
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
                raise ValueError("it has a whole number of more than 64 bits")
            elif finite and isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"it has {one}, which is no number")
        if not following:
            return
        level = following
    raise ValueError("it is nested too deep")


def _named(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


# --- settings ---


def from_plain(cls: type[T], values: Any, what: str) -> T:
    """A dataclass from what JSON holds of it: a value of the right type for each field, and no others.

    Args:
        cls: The dataclass.
        values: Its fields by name; those that are dataclasses themselves already made.
        what: What to call it in messages.

    Raises:
        ValueError: A field is missing, unknown or of another type, or the dataclass refuses its value.
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
    """Refuse a value that is not of the type of the field with its name; other names are passed over.

    Raises:
        ValueError: There is one.
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
    # In Python 3.10 a type with arguments, such as tuple[int, int], is itself a type to isinstance.
    return origin is not None or not isinstance(hint, type) or isinstance(value, hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def alike(one: Any, other: Any) -> bool:
    """Whether two values as JSON has them are built alike: the same names, and values of the same types; a number is a number.

    >>> alike({"a": [1, 2.0]}, {"a": (3, 4)}), alike({"a": 1}, {"a": "1"})
    (True, False)
    """
    if isinstance(other, dict):
        return (
            isinstance(one, dict)
            and one.keys() == other.keys()
            and all(alike(one[name], other[name]) for name in other)
        )
    if isinstance(other, list | tuple):
        return (
            isinstance(one, list | tuple) and len(one) == len(other) and all(map(alike, one, other))
        )
    return _is_number(one) if _is_number(other) else isinstance(one, type(other))


# --- names and weights ---


def file_in(folder: Path, name: str) -> Path:
    """The file of this name in a folder, and nowhere else.

    Raises:
        ValueError: The name is a path, or that of a link that leads out of the folder.

    >>> file_in(Path("."), "../secret")
    Traceback (most recent call last):
    ...
    ValueError: '../secret' is not the name of a file in '.': it leads elsewhere.
    """
    path = folder / name
    is_name = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    if not is_name or (path.is_symlink() and path.resolve().parent != folder.resolve()):
        raise ValueError(
            f"{name!r:.200} is not the name of a file in {str(folder)!r}: it leads elsewhere."
        )
    return path


class TensorClaim(NamedTuple):
    """What a safetensors file says of one tensor."""

    dtype: str
    """As safetensors names it, e.g. F32."""
    shape: tuple[int, ...]


def tensors_in(path: Path, max_header: int = MAX_HEADER) -> dict[str, TensorClaim]:
    """What a safetensors file holds, by its header alone, which safetensors compares with the size of the file.

    Raises:
        ValueError: The file is damaged, or its header is larger than that.
        OSError: It is not there or cannot be read.
    """
    try:
        check_header(path, max_header)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorClaim(str(one.get_dtype()), tuple(one.get_shape()))
                for name, one in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it, or make it again.") from error


def check_header(path: Path, max_header: int) -> None:
    """Refuse a safetensors file whose header is larger than that, before anybody reads it.

    Raises:
        ValueError: It is, or the file is none.
        OSError: The file is not there or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > max_header:
        raise ValueError(
            f"{path} claims a header of {length:,} bytes; no file of its kind has more than {max_header:,}."
        )
