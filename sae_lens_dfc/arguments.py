"""The command line's arguments: a file or a recipe stands for flags, and for lists that flags cannot say."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae_lens_dfc.recipes import flattened, merge, recipe_settings
from sae_lens_dfc.sources import SourceConfig


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
    command = next(iter(args), "")
    if command in fields_of:
        recipe = _value_of(args, "--recipe") or values.pop("recipe", None)
        values.pop("recipe", None)
        if recipe is not None:
            values = _with_recipe(recipe, values, args)
        foreign = set().union(*fields_of.values()) - set(fields_of[command])
        values = {name: value for name, value in values.items() if name not in foreign}
    sources = values.pop("sources", None)
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
    if isinstance(values.get("sae"), list):
        given |= set.intersection(*({f"sae.{name}" for name in sae} for sae in values["sae"]))
    return merge(recipe_settings(recipe, given), values)


def _source(values: Any) -> SourceConfig:
    try:
        return SourceConfig(**values)
    except TypeError as error:
        raise ValueError(
            f"A source is a mapping with dataset_path and, if need be, weight and text_column; got {values!r}: {error}"
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"Could not read configuration {path}: {error}".replace("\n", " ")
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"Configuration {path} must be a mapping of flags to values.")
    return values


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
