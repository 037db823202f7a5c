"""Entry point of the command line, `sae-lens-dfc COMMAND`; `COMMANDS` lists all commands.

Results go to standard output, progress and logs to standard error. A failure prints one line and
exits with status 1, wrong usage with 2, and a signal (Ctrl-C) with 128 plus its number.

Help, the version and an unknown command are handled from the table, without importing torch,
SAELens or the dataclass parser. A command's module is imported only when it is chosen.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from typing_extensions import override

import sae_lens_dfc
from sae_lens_dfc.core.terminal import MOST_OF_OURS, printable, said_by

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "sae_lens_dfc.cli.demo",
        "Train and evaluate a crosscoder to find differences between two models; by default on two small models that need no "
        "hub access.",
    ),
    "check": (
        "sae_lens_dfc.cli.check",
        "Check two models and a text before training: what they are, whether they are compatible, and the time, memory and disk space that training needs.",
    ),
    "train": ("sae_lens_dfc.cli.train", "Train a crosscoder on two models and save it."),
    "cache": (
        "sae_lens_dfc.cli.cache",
        "Cache both models' activations on a text, so that `train` can reuse them.",
    ),
    "align": (
        "sae_lens_dfc.cli.align",
        "Report how many tokens of two tokenizers end at the same characters of a text, and why the others are not paired.",
    ),
    "evaluate": (
        "sae_lens_dfc.cli.evaluate",
        "Evaluate a trained crosscoder on held-out text: a quick check, or with --output all measures, with nulls for "
        "comparison.",
    ),
    "export": (
        "sae_lens_dfc.cli.export",
        "Export one model's half of a trained crosscoder as a SAELens SAE, and measure what it loses.",
    ),
    "report": ("sae_lens_dfc.cli.report", "Write an HTML report on a trained crosscoder."),
    "steer": (
        "sae_lens_dfc.cli.steer",
        "Print a model's answer to a prompt, with and without steering by latents of a trained crosscoder.",
    ),
    "screen": (
        "sae_lens_dfc.cli.screen",
        "Screen all latents of a run for differences between the models, test the best candidates causally, and write a "
        "report; an interrupted screening is resumed.",
    ),
    "latents": (
        "sae_lens_dfc.cli.latents",
        "List a trained crosscoder's latents on held-out text: activation, firing rate, top contexts, promoted tokens and "
        "exclusivity.",
    ),
    "generate": (
        "sae_lens_dfc.cli.generate",
        "Write both models' answers to each prompt of a data set, as text to train a delta crosscoder on.",
    ),
    "model-organism": (
        "sae_lens_dfc.cli.model_organism",
        "Build a model organism: two models with one known, planted difference, to train on and test detection with.",
    ),
}
"""The module of each command, with its options (`OPTIONS`) and entry point (`run`), and the
command's help."""


class Program(NamedTuple):
    """A command line."""

    commands: Mapping[str, tuple[str, str]] = COMMANDS
    """As `COMMANDS`."""
    before_command: str = "sae-lens-dfc"
    """What is typed before a command."""
    name: str = "sae-lens-dfc"
    """Begins each error line."""


SAE_LENS_DFC = Program()
FAILURES = (ValueError, OSError, MemoryError, RuntimeError)
"""Errors that the input or the machine can cause."""
NO_MEMORY = "can't allocate memory"


def options_class(command: str, program: Program = SAE_LENS_DFC) -> type:
    """The dataclass whose fields are a command's flags."""
    return import_module(program.commands[command][0]).OPTIONS


def options_of(command: str, args: Sequence[str], program: Program = SAE_LENS_DFC) -> Any:
    """Parse a command line into the command's options dataclass.

    Args:
        command: One of the program's commands.
        args: The command line, including the command.
        program: The command line that it belongs to.

    Raises:
        ValueError: A configuration file cannot be read, or a value is invalid.
        SystemExit: Help was requested, or the usage is wrong.
    """
    # Imported only once a command is known: it loads the dataclass parser.
    from sae_lens_dfc.cli.parser import parsed

    summary, options = program.commands[command][1], options_class(command, program)
    return parsed(args, command, summary, options, partial(_around, program))


def _chosen(args: Sequence[str], program: Program) -> str:
    """The command's name; help, the version and wrong usage exit here."""
    if args and args[0] in program.commands:
        return args[0]
    parser, commands = _around(program, argparse.ArgumentParser)
    for name, (_, summary) in program.commands.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser.parse_args(args).command


def _around(
    program: Program, of_command: type[argparse.ArgumentParser]
) -> tuple[argparse.ArgumentParser, Any]:
    """The main parser, and its subparsers action with the given parser class."""
    parser = argparse.ArgumentParser(prog=program.before_command, description=sae_lens_dfc.__doc__)
    parser.add_argument("--version", action="version", version=version("sae-lens-dfc"))
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=of_command
    )
    return parser, commands


class _PlainFormatter(logging.Formatter):
    """Escape control characters, because log lines may quote untrusted text."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _log_to_standard_error() -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PlainFormatter("%(message)s"))
    logging.getLogger("sae_lens_dfc").setLevel(logging.INFO)


def main(args: Sequence[str] | None = None, program: Program = SAE_LENS_DFC) -> int:
    """Run one command; returns the exit status.

    Args:
        args: The command line, including the command. If None: that of the process.
        program: The command line that the command belongs to.
    """
    # Enables huge pages; torch reads this at its first large allocation. With small pages a CPU
    # training step takes 10 % longer, because each gradient is a new allocation as large as the
    # dictionary.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _log_to_standard_error()
    try:
        status, said = _outcome(sys.argv[1:] if args is None else args, program)
    except KeyboardInterrupt as asked:
        # `Interrupted` has a signal number; Python's own KeyboardInterrupt, raised during imports,
        # has none.
        number: int = getattr(asked, "number", signal.SIGINT)
        status, said = 128 + number, str(asked) or "stopped"
    # Printed only now, after the error's progress bars are closed and have ended their lines.
    if said:
        sys.stderr.write(f"{program.name}: {printable(said)}\n")
    return status


def _outcome(args: Sequence[str], program: Program) -> tuple[int, str]:
    """The exit status and the error message, if any."""
    command = _chosen(args, program)
    # Outside the try: a package that fails to import is not an input error, and keeps its
    # traceback.
    work = import_module(program.commands[command][0])
    try:
        options = options_of(command, args, program)
    except FAILURES as error:
        return 1, _said_of(error)
    # Imported after help is handled: both load torch and SAELens. The first registers the
    # architectures, so that saved crosscoders can be loaded by name.
    import_module("sae_lens_dfc.api")
    from sae_lens_dfc.core.interrupts import signals_to, stop_now

    try:
        with signals_to(stop_now):
            return work.run(options) or 0, ""
    except FAILURES as error:
        return 1, _said_of(error)


def _said_of(error: Exception) -> str:
    """The message for a failure; any other error is raised again."""
    if isinstance(error, ValueError | OSError):
        _drop_what_nobody_takes()
        return f"error: {said_by(error, MOST_OF_OURS)}"
    if not _is_of_memory(error):
        raise
    advice = "Use smaller batches, fewer latents or pairs, or a machine with more memory."
    return f"error: Out of memory: {said_by(error)} {advice}"


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Torch has its own exception for GPU memory, but not for main
    memory."""
    from torch import OutOfMemoryError

    return isinstance(error, MemoryError | OutOfMemoryError) or NO_MEMORY in str(error)


def _drop_what_nobody_takes() -> None:
    """Otherwise Python would flush standard output again at exit, and change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
