"""Expands `--config` files and recipes into flags, and handles settings that flags cannot express,
such as lists."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_dfc.core.parsing import read_yaml
from sae_lens_dfc.core.schema import flattened, from_plain, merge
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.config import SourceConfig

NOT_OF_A_FILE = {
    "reference": "a folder whose code is run",
    "judge_url": "an address that is sent your key and the texts",
}
"""Flags not allowed in a configuration file, which may come from someone else, and the reason."""

MODEL_FLAGS = {
    "--model-a": (["--model-a.model-name"], "Hub name, folder or .gguf file of the first model."),
    "--model-b": (["--model-b.model-name"], "The second model."),
    "--hook-a": (["--model-a.hook-name"], "Hook of the first model."),
    "--hook-b": (["--model-b.hook-name"], "Hook of the second model."),
    "--dtype": (["--model-a.dtype", "--model-b.dtype"], "Number format of both models."),
}
TEXT_FLAGS = {"--dataset": (["--dataset-path"], "Hub name, file, folder, or cpython-docs.")}
CROSSCODER_FLAGS = {
    "--d-sae": (["--sae.d-sae"], "Latents of the crosscoder."),
    "--k": (["--sae.k"], "Latents active for each pair, on average."),
}
SHORT = {
    "check": {**MODEL_FLAGS, **TEXT_FLAGS, **CROSSCODER_FLAGS},
    "train": {**MODEL_FLAGS, **TEXT_FLAGS, **CROSSCODER_FLAGS},
    "cache": {**MODEL_FLAGS, **TEXT_FLAGS},
    "generate": MODEL_FLAGS,
}
"""Short flags of each command with nested ones, named as in `demo`: the flags they set, and their
help."""
ALSO_SHORT = {"-k": "--k"}
D_SAE = "--sae.d-sae"
D_SAE_OF_DEMO = "2048"


class Arguments(NamedTuple):
    """A parsed command line."""

    command: list[str]
    """The command, if any."""
    of_files: list[str]
    """Flags from configuration files and recipes."""
    given: list[str]
    """Flags from the command line, which take precedence."""
    sources: list[Any] | None
    """The data sets, each a `SourceConfig`, if a file lists them."""
    saes: list[list[str]]
    """The flags of each crosscoder, if a file lists several."""


def with_files(
    args: Sequence[str],
    fields_of: Mapping[str, Collection[str]],
    switches: Collection[str] = (),
) -> Arguments:
    """Expand `--recipe NAME` and `--config FILE` in a command line.

    Args:
        args: The command line.
        fields_of: Settings of each command that accepts recipes. They can share one file: each
            command uses its own settings and ignores the others'.
        switches: Settings whose flags take no value.

    Raises:
        ValueError: A file cannot be read, the recipe does not exist, or the recipe needs a setting
            that is not given.
    """
    command = next(iter(args), "")
    args = [command, *with_long_names(command, args[1:])] if args else []
    config = _value_of(args, "--config")
    values = {} if config is None else _read_config(Path(config))
    saes = values.get("sae", {})
    if saes == [] or (isinstance(saes, list) and not all(isinstance(s, Mapping) for s in saes)):
        raise ValueError(
            f"If sae is a list, it must be a nonempty list of mappings of settings, got {saes!r:.80}."
        )
    if command in fields_of:
        recipe = _value_of(args, "--recipe") or values.pop("recipe", None)
        values.pop("recipe", None)
        if not isinstance(recipe, str | None):
            raise ValueError(f"recipe must be the name of a recipe, got {recipe!r:.80}.")
        if recipe is not None:
            values = _with_recipe(recipe, values, args)
        foreign = set().union(*fields_of.values()) - set(fields_of[command])
        values = {name: value for name, value in values.items() if name not in foreign}
    sources = values.pop("sources", None)
    if not isinstance(sources, list | None):
        raise ValueError(f"sources must be a list of data sets, got {sources!r:.80}.")
    if sources is not None and "dataset_path" in values:
        raise ValueError(
            "A configuration has both sources and dataset_path. Move dataset_path into sources."
        )
    if any(arg.startswith("--dataset-path") for arg in args):
        sources = None
    saes = values.pop("sae") if isinstance(values.get("sae"), list) else []
    given_sources = None if sources is None else [_source(source) for source in sources]
    sae_flags = [list(_sae_flags(sae)) for sae in saes]
    of_files = with_long_names(command, list(_flags(values, switches)))
    given = list(args[1:])
    if command == "check":
        given += _size_if_none([*of_files, *given, *chain(*sae_flags)])
    return Arguments(list(args[:1]), of_files, given, given_sources, sae_flags)


def with_long_names(command: str, args: Sequence[str]) -> list[str]:
    """Translate a command's short flags into the flags that they set.

    >>> with_long_names("train", ["--model-a", "x", "-k", "8", "--dtype=float16"])
    ['--model-a.model-name', 'x', '--sae.k', '8', '--model-a.dtype=float16', '--model-b.dtype=float16']
    """
    short = SHORT.get(command, {})
    long: list[str] = []
    rest = iter(args)
    for arg in rest:
        name, _, value = arg.partition("=")
        names, _ = short.get(ALSO_SHORT.get(name, name), ([], ""))
        if not names:
            long.append(arg)
        elif value:
            long += [f"{one}={value}" for one in names]
        else:
            values = list(islice(rest, 1))
            long += [part for one in names for part in (one, *values)]
    return long


def _size_if_none(flags: Sequence[str]) -> list[str]:
    """Default dictionary size for `check`: that of the demo."""
    return [] if any(flag.partition("=")[0] == D_SAE for flag in flags) else [D_SAE, D_SAE_OF_DEMO]


def parsed_with_lists(arguments: Arguments, parse: Callable[[list[str]], Any]) -> Any:
    """Parse the arguments, and add the lists that the parser cannot handle.

    Args:
        arguments: The expanded command line.
        parse: Parses flags into a namespace.
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
    # Imported here, because it loads training code that most commands do not need.
    from sae_lens_dfc.training.recipes.settings import recipe_settings

    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    given = {name.removeprefix("--").replace("-", "_") for name in flags} | {*flattened(values)}
    saes = values.get("sae")
    if not isinstance(saes, list):
        return merge(recipe_settings(recipe, given), values)
    given |= set.intersection(*({f"sae.{name}" for name in sae} for sae in saes))
    settings = recipe_settings(recipe, given)
    return merge(settings, {**values, "sae": [merge(settings["sae"], sae) for sae in saes]})


def _source(values: Any) -> Any:
    try:
        return from_plain(SourceConfig, values, "A source")
    except ValueError as error:
        raise ValueError(
            f"A source must be a mapping with dataset_path and optionally weight and text_column, got {values!r:.200}: {said_by(error)}"
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
        raise ValueError(f"Could not read configuration {path}: {said_by(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Configuration {path} must be a mapping of flags to values.")
    return _settings(values, path)


def _settings(values: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Convert hyphenated flag names to Python setting names.

    Raises:
        ValueError: An entry is not a flag with a value, is given twice, or is only allowed on the
            command line.
    """
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*([.-]\w+)*", name, re.ASCII):
            raise ValueError(
                f"Configuration {path} has {name!r:.80} where it needs the name of a flag."
            )
        setting = name.replace("-", "_")
        if setting in NOT_OF_A_FILE:
            raise ValueError(
                f"Configuration {path} sets {name}, {NOT_OF_A_FILE[setting]}. Give {_flag(setting)} on the command line."
            )
        if setting in settings:
            raise ValueError(f"Configuration {path} sets {setting} twice. Keep one.")
        if isinstance(value, list):
            settings[setting] = [_value(one, name, path, is_of_list=True) for one in value]
        else:
            settings[setting] = _value(value, name, path)
    return settings


def _value(value: Any, name: str, path: Path, is_of_list: bool = False) -> Any:
    if isinstance(value, Mapping):
        return _settings(value, path)
    # Values of a list become separate command-line arguments.
    if is_of_list and isinstance(value, str) and re.match(r"-[^\d.]", value):
        raise ValueError(
            f"Configuration {path} has the flag {value!r:.80} among the values of {name}."
        )
    if isinstance(value, list | bytes | set | tuple):
        raise ValueError(
            f"Configuration {path} has {value!r:.80} where one value of {name} should be."
        )
    return value


def _flags(settings: Mapping[str, Any], switches: Collection[str] = ()) -> Iterator[str]:
    for name, value in flattened(settings).items():
        if value is True:
            yield _flag(name)
        elif value is False and name in switches:
            continue
        elif isinstance(value, list):
            yield from (_flag(name), *map(str, value))
        elif value is not None:
            yield f"{_flag(name)}={value}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
