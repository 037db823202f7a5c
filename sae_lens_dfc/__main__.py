"""The command line: `sae-lens-dfc COMMAND`; `COMMANDS` has them all.

What a person reads goes to standard output, progress and logs to standard error. A failure is one
line and exit status 1, wrong usage 2; what was asked to end (Ctrl-C) has 128 and the signal's number.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from simple_parsing import (
    ArgumentGenerationMode,
    ArgumentParser,
    DashVariant,
    NestedMode,
    field,
    subgroups,
)
from typing_extensions import override

import sae_lens_dfc  # noqa: F401  (registers the architectures)
from sae_lens_dfc import ranks
from sae_lens_dfc.alignment import REASONS, Coverage, align
from sae_lens_dfc.arguments import parsed_with_lists, with_files
from sae_lens_dfc.benchmark.planted.folder import OrganismOptions, write_organism
from sae_lens_dfc.benchmark.suite import BenchmarkOptions, benchmark
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.demo import DemoConfig, run_demo
from sae_lens_dfc.exporting import ExportOptions, export_run
from sae_lens_dfc.generate import GenerateOptions, generate
from sae_lens_dfc.held_out import EvaluateOptions, ReportOptions, evaluate_run, write_report
from sae_lens_dfc.latent_list import LatentsOptions, list_latents
from sae_lens_dfc.measured_run import REPORT_FILENAME
from sae_lens_dfc.measures import measures_table, text_table
from sae_lens_dfc.output import say
from sae_lens_dfc.recipes import RECIPES
from sae_lens_dfc.screen import ScreenOptions, screen_run
from sae_lens_dfc.sources import MAX_CHARS
from sae_lens_dfc.steer import SteerOptions, steer_run
from sae_lens_dfc.stopping import Stopped, signals_to, stop_now
from sae_lens_dfc.terminal import printable
from sae_lens_dfc.texts import TABLE_LOADERS, clean, first_line, load_texts, read_text, split_text
from sae_lens_dfc.tokens import load_tokenizer, tokenize
from sae_lens_dfc.training.caching import CacheConfig, cache_activations
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import DataConfig
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

ARCHITECTURES: dict[str, Any] = {
    name: config
    for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
    if issubclass(config, CrosscoderTrainingConfig)
}


@dataclass(kw_only=True)
class TrainOptions(CrosscoderRunnerConfig):
    """Train a crosscoder on two models and save it."""

    sae: CrosscoderTrainingConfig = subgroups(ARCHITECTURES, default="dfc", alias="--architecture")
    """The crosscoder."""
    output_path: str | None = "runs/crosscoder"
    """Folder for the trained crosscoder."""
    n_checkpoints: int = 10
    """Checkpoints during training, evenly spaced; the last two are kept."""

    def __post_init__(self) -> None:
        if self.checkpoint_path is None and self.output_path is not None:
            self.checkpoint_path = f"{self.output_path.rstrip('/')}-checkpoints"
        super().__post_init__()


@dataclass(kw_only=True)
class CacheOptions(CacheConfig):
    """Run two models over a text once and keep their activations, for `train --cache-path`."""


@dataclass
class AlignOptions:
    """Count how many tokens of two tokenizers end at the same characters of a text, and why the others do not."""

    tokenizer_a: str
    """Hub name, folder or .gguf file."""
    tokenizer_b: str
    """Hub name, folder or .gguf file."""
    file: str = field(positional=True, metavar="FILE")
    """A text file, any data set that `train` takes, or cpython-docs."""
    text_column: str = "text"
    """Column that holds the text."""
    json: bool = field(default=False, action="store_true")
    """Print JSON."""


def demo(options: DemoConfig) -> None:
    """Run the main job on two models and say where its results are."""
    metrics = run_demo(options)
    say(text_table(*measures_table(metrics)))
    say(f"\nReport: {Path(options.output) / REPORT_FILENAME}")


def train(options: TrainOptions) -> None:
    """Train and save, with the other processes if torchrun started any."""
    output = options.output_path
    with ranks.process_group(options.device) as device:
        runner = CrosscoderTrainingRunner(_of_this_rank(replace(options, device=device)))
        if not runner.is_finished:
            runner.run_all()
        if ranks.rank() == 0:
            names = list(runner.cfg.saes)
            folders = [output] if len(names) == 1 else [f"{output}/{name}" for name in names]
            note = " (it was finished already)" if runner.is_finished else ""
            say("\n".join(f"Crosscoder: {folder}{note}" for folder in folders))


def cache(options: CacheOptions) -> None:
    """Write a cache, with the other processes if torchrun started any."""
    devices = options.model_a.device, options.model_b.device
    with ranks.process_group(next((d for d in devices if d != "cpu"), "cpu")):
        cached = cache_activations(_of_this_rank(options))
        if ranks.rank() == 0:
            coverage = cached.counts.coverage
            say(f"Cache: {cached.folder}, {len(cached):,} rows of {cached.d_a} + {cached.d_b}")
            say(f"Paired: {coverage.a:.1%} of A's tokens, {coverage.b:.1%} of B's")


T_DATA = TypeVar("T_DATA", bound=DataConfig)


def _of_this_rank(cfg: T_DATA) -> T_DATA:
    """The settings with this process's own devices for the models."""
    return replace(
        cfg,
        n_ranks=ranks.world_size(),
        model_a=replace(cfg.model_a, device=ranks.own_device(cfg.model_a.device)),
        model_b=replace(cfg.model_b, device=ranks.own_device(cfg.model_b.device)),
    )


def align_texts(options: AlignOptions) -> None:
    """Print the coverage of two tokenizers on a text."""
    a, b = load_tokenizer(options.tokenizer_a), load_tokenizer(options.tokenizer_b)
    path = Path(options.file)
    if path.is_file() and path.suffix not in TABLE_LOADERS:
        texts = [read_text(path)]
    else:
        texts = load_texts(options.file, options.text_column)
    coverage = Coverage()
    for text in texts:
        for piece in split_text(clean(text), MAX_CHARS):
            coverage.add(align(tokenize(a, piece), tokenize(b, piece))[1])
    if coverage.pairs == 0:
        raise ValueError(
            f"{options.file!r} has no paired position: {coverage.tokens_a} tokens of A, {coverage.tokens_b} of B, "
            "and no character at which both end one. Check that the file holds text."
        )
    if options.json:
        say(json.dumps(coverage.to_dict()))
        return
    say(f"A: {coverage.pairs} of {coverage.tokens_a} tokens paired ({coverage.a:.1%})")
    say(f"B: {coverage.pairs} of {coverage.tokens_b} tokens paired ({coverage.b:.1%})")
    reasons = sorted({*coverage.dropped_a, *coverage.dropped_b})
    rows = [[REASONS[r], str(coverage.dropped_a[r]), str(coverage.dropped_b[r])] for r in reasons]
    if rows:
        say("\n" + text_table(["why a token is not paired", "A", "B"], rows))


def write_answers(options: GenerateOptions) -> None:
    """Write both models' answers to the prompts and say where."""
    n_rows = generate(options)
    say(f"Answers to {n_rows} prompts: {options.output}")


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "demo": (DemoConfig, demo),
    "train": (TrainOptions, train),
    "cache": (CacheOptions, cache),
    "align": (AlignOptions, align_texts),
    "evaluate": (EvaluateOptions, evaluate_run),
    "export": (ExportOptions, export_run),
    "report": (ReportOptions, write_report),
    "steer": (SteerOptions, steer_run),
    "screen": (ScreenOptions, screen_run),
    "latents": (LatentsOptions, list_latents),
    "generate": (GenerateOptions, write_answers),
    "benchmark": (BenchmarkOptions, benchmark),
    "organism": (OrganismOptions, write_organism),
}


NO_MEMORY = "can't allocate memory"
TAKE_RECIPES = {
    name: {f.name for f in fields(COMMANDS[name][0])} | extra
    for name, extra in (("train", {"architecture"}), ("cache", set[str]()))
}


def _parser() -> ArgumentParser:
    style: dict[str, Any] = {
        "add_option_string_dash_variants": DashVariant.DASH,
        "argument_generation_mode": ArgumentGenerationMode.NESTED,
        "nested_mode": NestedMode.WITHOUT_ROOT,
    }
    parser = ArgumentParser(prog="sae-lens-dfc", description=sae_lens_dfc.__doc__, **style)
    parser.add_argument("--version", action="version", version=version("sae-lens-dfc"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (options, _) in COMMANDS.items():
        summary = (options.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False, **style
        )
        command.add_argument(
            "--config", metavar="FILE", help="YAML file of these flags; flags given here win"
        )
        if name in TAKE_RECIPES:
            listed = "; ".join(f"{recipe}: {r.summary}" for recipe, r in RECIPES.items())
            command.add_argument(
                "--recipe",
                metavar="NAME",
                help=f"settings by name; --config and flags win. {listed}",
            )
        command.add_arguments(options, dest="options")
    return parser


class _PlainFormatter(logging.Formatter):
    """Log lines may name what a file says."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    # Torch looks at it with its first large tensor. In small pages a step on a CPU takes a tenth longer, as each gradient
    # is as large as the dictionary, and new.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PlainFormatter("%(message)s"))
    logging.getLogger("sae_lens_dfc").setLevel(logging.INFO)
    try:
        arguments = with_files(sys.argv[1:] if args is None else args, TAKE_RECIPES)
        parsed = parsed_with_lists(arguments, lambda flags: _parser().parse_args(flags))
        with signals_to(stop_now):
            return COMMANDS[parsed.command][1](parsed.options) or 0
    except KeyboardInterrupt as asked:
        number = asked.number if isinstance(asked, Stopped) else signal.SIGINT
        sys.stderr.write(f"sae-lens-dfc: {str(asked) or 'stopped'}\n")
        return 128 + number
    except (ValueError, OSError) as error:
        _drop_what_nobody_takes()
        return _failed(str(error))
    except (MemoryError, RuntimeError) as error:
        # Torch has an error of its own for a GPU's memory, and none for the machine's.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and NO_MEMORY not in str(
            error
        ):
            raise
        return _failed(
            f"Out of memory: {first_line(error)} Take smaller batches, fewer latents or pairs, or a machine with more."
        )


def _drop_what_nobody_takes() -> None:
    """Python would try standard output once more at its end, and end with another status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _failed(message: str) -> int:
    sys.stderr.write(f"sae-lens-dfc: error: {printable(' '.join(message.split()))}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
