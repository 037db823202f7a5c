"""The command line's arguments: a file or a recipe stands for flags, and for lists that flags cannot say."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_dfc.files import from_plain, read_yaml
from sae_lens_dfc.recipes import flattened, merge, recipe_settings
from sae_lens_dfc.sources import SourceConfig

NOT_OF_A_FILE = {
    "reference": "a folder whose code is run",
    "judge_url": "an address that is sent your key and the texts",
}
"""Flags that a configuration cannot give, since it may be somebody else's, and what they name."""


class Arguments(NamedTuple):
    """What a command line asks for."""

    command: list[str]
    """The command, if there is one."""
    of_files: list[str]
    """Flags that files stand for."""
    given: list[str]
    """Flags of the command line, which win."""
    sources: list[SourceConfig] | None
    """The data sets, where a file lists them."""
    saes: list[list[str]]
    """Where a file lists crosscoders: the flags of each."""


def with_files(args: Sequence[str], fields_of: Mapping[str, Collection[str]]) -> Arguments:
    """The arguments with what `--recipe NAME` and `--config FILE` stand for.

    Args:
        args: A command line.
        fields_of: Which settings each command that takes recipes has. One file serves all of them: each takes what
            is its own.

    Raises:
        ValueError: A file cannot be read, or there is no such recipe, or it needs something that is not given.
    """
    config = _value_of(args, "--config")
    values = {} if config is None else _read_config(Path(config))
    if isinstance(saes := values.get("sae", {}), list) and not _are_settings(saes):
        raise ValueError(
            f"Where sae is a list, each of its parts must be a mapping of settings, and there must be one; got {saes!r:.80}."
        )
    command = next(iter(args), "")
    if command in fields_of:
        recipe = _value_of(args, "--recipe") or values.pop("recipe", None)
        values.pop("recipe", None)
        if not isinstance(recipe, str | None):
            raise ValueError(f"recipe must be the name of one, got {recipe!r:.80}.")
        if recipe is not None:
            values = _with_recipe(recipe, values, args)
        foreign = set().union(*fields_of.values()) - set(fields_of[command])
        values = {name: value for name, value in values.items() if name not in foreign}
    sources = values.pop("sources", None)
    if not isinstance(sources, list | None):
        raise ValueError(f"sources must be a list of data sets, got {sources!r:.80}.")
    if sources is not None and "dataset_path" in values:
        raise ValueError(
            "A configuration has both sources and dataset_path. Put the data set among the sources."
        )
    if any(arg.startswith("--dataset-path") for arg in args):
        sources = None
    saes = values.pop("sae") if isinstance(values.get("sae"), list) else []
    given_sources = None if sources is None else [_source(source) for source in sources]
    sae_flags = [list(_sae_flags(sae)) for sae in saes]
    return Arguments(list(args[:1]), list(_flags(values)), list(args[1:]), given_sources, sae_flags)


def parsed_with_lists(arguments: Arguments, parse: Callable[[list[str]], Any]) -> Any:
    """What the parser makes of the arguments, the lists that it cannot take put in.

    Args:
        arguments: Of a command.
        parse: Gives the namespace of flags.
    """
    command, of_files, given, *_ = arguments
    variants = arguments.saes or [[]]
    first, *others = [parse([*command, *of_files, *sae, *given]) for sae in variants]
    if others:
        first.options.other_saes = [other.options.sae for other in others]
    if arguments.sources is not None:
        first.options.sources = arguments.sources
    return first


def _with_recipe(recipe: str, values: Mapping[str, Any], args: Sequence[str]) -> dict[str, Any]:
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    given = {name.removeprefix("--").replace("-", "_") for name in flags} | {*flattened(values)}
    saes = values.get("sae")
    if not isinstance(saes, list):
        return merge(recipe_settings(recipe, given), values)
    given |= set.intersection(*({f"sae.{name}" for name in sae} for sae in saes))
    settings = recipe_settings(recipe, given)
    return merge(settings, {**values, "sae": [merge(settings["sae"], sae) for sae in saes]})


def _are_settings(saes: Sequence[Any]) -> bool:
    return len(saes) > 0 and all(isinstance(sae, Mapping) for sae in saes)


def _source(values: Any) -> SourceConfig:
    try:
        return from_plain(SourceConfig, values, "A source")
    except ValueError as error:
        raise ValueError(
            f"A source is a mapping with dataset_path and, if need be, weight and text_column; got {values!r:.200}: {error}"
        ) from error


def _sae_flags(values: Mapping[str, Any]) -> Iterator[str]:
    settings = dict(values)
    if "architecture" in settings:
        yield f"--architecture={settings.pop('architecture')}"
    yield from _flags({"sae": settings})


def _value_of(args: Sequence[str], flag: str) -> str | None:
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == flag and (value or i + 1 < len(args)):
            return value or args[i + 1]
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not read configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Configuration {path} must be a mapping of flags to values.")
    return _settings(values, path)


def _settings(values: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Settings by the name that Python gives them, where a flag's name has hyphens.

    Raises:
        ValueError: Something is not a flag with its value, is there twice, or is a flag that only a command line may give.
    """
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*([.-]\w+)*", name, re.ASCII):
            raise ValueError(
                f"Configuration {path} has {name!r:.80} where the name of a flag should be."
            )
        setting = name.replace("-", "_")
        if setting in NOT_OF_A_FILE:
            raise ValueError(
                f"Configuration {path} sets {name}, {NOT_OF_A_FILE[setting]}. Give {_flag(setting)} on the command line."
            )
        if setting in settings:
            raise ValueError(f"Configuration {path} has {setting} twice. Keep one.")
        if isinstance(value, list):
            settings[setting] = [_value(one, name, path, is_of_list=True) for one in value]
        else:
            settings[setting] = _value(value, name, path)
    return settings


def _value(value: Any, name: str, path: Path, is_of_list: bool = False) -> Any:
    if isinstance(value, Mapping):
        return _settings(value, path)
    # A list's values stand alone on the command line.
    if is_of_list and isinstance(value, str) and re.match(r"-[^\d.]", value):
        raise ValueError(
            f"Configuration {path} has the flag {value!r:.80} among the values of {name}."
        )
    if isinstance(value, list | bytes | set | tuple):
        raise ValueError(
            f"Configuration {path} has {value!r:.80} where one value of {name} should be."
        )
    return value


def _flags(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flattened(settings).items():
        if value is True:
            yield _flag(name)
        elif isinstance(value, list):
            yield from (_flag(name), *map(str, value))
        elif value is not None:
            yield f"{_flag(name)}={value}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
