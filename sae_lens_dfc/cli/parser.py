"""Builds each command's argument parser, including `--config` and `--recipe`."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from simple_parsing import ArgumentGenerationMode, ArgumentParser, DashVariant, NestedMode

from sae_lens_dfc.cli.arguments import (
    ALSO_SHORT,
    CROSSCODER_FLAGS,
    SHORT,
    parsed_with_lists,
    with_files,
)
from sae_lens_dfc.core.flags import switches_of
from sae_lens_dfc.training.recipes.named import RECIPES
from sae_lens_dfc.training.recipes.organisms import RECIPE_PREFIX

TAKE_RECIPES = ("check", "train", "cache")
"""Commands that can share one configuration file or recipe."""
STAND_FOR_FLAGS = ("--config", "--recipe")
STYLE: dict[str, Any] = {
    "add_option_string_dash_variants": DashVariant.DASH,
    "argument_generation_mode": ArgumentGenerationMode.NESTED,
    "nested_mode": NestedMode.WITHOUT_ROOT,
}

Around = Callable[[type[argparse.ArgumentParser]], tuple[argparse.ArgumentParser, Any]]
"""Makes the main parser with subparsers of the given class, and returns both."""


def parsed(args: Sequence[str], command: str, summary: str, options: type, around: Around) -> Any:
    """Parse a command line into the command's options dataclass.

    Args:
        args: The command line.
        command: Its command.
        summary: Help text of the command.
        options: The options dataclass.
        around: Makes the main parser that the command's parser belongs to.

    Raises:
        ValueError: A configuration file cannot be read, or a value is invalid.
        SystemExit: Help was requested, or a flag is invalid.
    """
    flags = {arg.partition("=")[0] for arg in args}
    shares_files = command in TAKE_RECIPES and not flags.isdisjoint(STAND_FOR_FLAGS)
    taken = settings_taken() if shares_files else {}
    arguments = with_files(args, taken, set(switches_of(options)))

    def parse(flags: Sequence[str]) -> argparse.Namespace:
        parser, commands = around(ArgumentParser)
        about: dict[str, Any] = {"help": summary, "description": summary, "allow_abbrev": False}
        _add_flags(commands.add_parser(command, **STYLE, **about), command, options)
        return parser.parse_args(flags)

    found = parsed_with_lists(arguments, parse).options
    if command == "check":
        found.given = arguments.given
    return found


def settings_taken() -> dict[str, set[str]]:
    """The settings of each command in `TAKE_RECIPES`."""
    # Imported here, because `--help` does not need them.
    from sae_lens_dfc.cli.cache import CacheOptions
    from sae_lens_dfc.cli.train import TrainOptions

    of_training = {f.name for f in fields(TrainOptions)} | {"architecture", "d_sae", "k"}
    # `check` takes the settings of `train`.
    return {
        "check": of_training,
        "train": of_training,
        "cache": {f.name for f in fields(CacheOptions)},
    }


def _add_flags(parser: ArgumentParser, command: str, options: type) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of these flags; flags given here win"
    )
    if command in TAKE_RECIPES:
        parser.add_argument(
            "--recipe",
            metavar="NAME",
            help=f"settings by name; --config and flags win. {_recipes()}",
        )
    for flag, (names, text) in SHORT.get(command, {}).items():
        short = [one for one, long in ALSO_SHORT.items() if long == flag]
        kind = "int" if flag in CROSSCODER_FLAGS else "str"
        text = f"{text} Short for {' and '.join(names)}."
        parser.add_argument(*short, flag, metavar=kind, help=text)
    parser.add_arguments(options, dest="options")


def _recipes() -> str:
    """The available recipes with their summaries."""
    listed = "; ".join(f"{recipe}: {r.summary}" for recipe, r in RECIPES.items())
    return f"{listed}; {RECIPE_PREFIX}…: a public model and its base (docs/how-to/organisms.md)"
