"""Formats the findings of a check for one screen."""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from itertools import chain

from tqdm.auto import tqdm

from sae_lens_dfc.core.terminal import counted, text_table
from sae_lens_dfc.models.model_facts import ModelFacts
from sae_lens_dfc.training.preflight.check import Findings
from sae_lens_dfc.training.preflight.estimate import duration, size
from sae_lens_dfc.training.preflight.first_look import n_documents, supply, together, top_reasons
from sae_lens_dfc.training.preflight.needs import PROCESSOR, Needs

WIDTH, HEIGHT = 100, 45
LABEL, COLUMN = 16, 41
MOST_SOURCES = 4
FEWEST_REMARKS = 6
"""Number of lines that problems and notes always get, however long the rest is."""


def screen_text(found: Findings, command: Sequence[str]) -> str:
    """Format all findings in at most 45 lines of 100 columns, ending with the command to run next.

    Args:
        found: The findings of the check.
        command: The flags of the training.
    """
    parts = [_models(found), _shared(found), _text(found), _needs(found)]
    above = list(chain.from_iterable([*lines, ""] for lines in map(list, parts) if lines))
    last = ["Next:" if not found.problems else "Once this is fixed:", *command_lines(command)]
    room = max(FEWEST_REMARKS, HEIGHT - len(above) - len(last) - 1)
    remarks = _remarks(found, room)
    return "\n".join([*above, *remarks, *([""] if remarks else []), *last])


def train_command(flags: Sequence[str]) -> str:
    """The training command as one line for a shell.

    >>> train_command(["--dataset-path", "my text.jsonl", "--sae.d-sae", "2048"])
    "sae-lens-dfc train --dataset-path 'my text.jsonl' --sae.d-sae 2048"
    """
    return " ".join(["sae-lens-dfc train", *map(shlex.quote, flags)])


def command_lines(flags: Sequence[str]) -> list[str]:
    """The training command in lines that fit the screen, and that a shell reads as one command."""
    lines = ["  sae-lens-dfc train"]
    for words in _flags_with_values(flags):
        if len(lines[-1]) + len(words) + len("  \\") > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {words}")
        else:
            lines[-1] += f" {words}"
    return lines


def _flags_with_values(flags: Sequence[str]) -> Iterator[str]:
    words: list[str] = []
    for flag in flags:
        if words and flag.startswith("--"):
            yield " ".join(words)
            words = []
        words.append(shlex.quote(flag))
    if words:
        yield " ".join(words)


def _models(found: Findings) -> Iterator[str]:
    yield _row("", "A", "B")
    a, b = (_fact_rows(found.models[name]) for name in ("a", "b"))
    for label in a | b:
        yield _row(label, a.get(label, ""), b.get(label, ""))


def _fact_rows(model: ModelFacts | None) -> dict[str, str]:
    if model is None:
        return {"model": "could not be opened"}
    return {
        "model": model.name,
        "architecture": f"{model.architecture}, {tqdm.format_sizeof(model.n_parameters)}",
        "depth, width": f"{model.n_layers} layers, {model.d_model}",
        "read at": f"{model.hook_name}, {model.hook_width} wide",
        "runs": f"in {model.dtype} on {model.device}",
        "reads at once": f"{model.n_ctx:,} tokens",
        "tokenizer": f"{model.tokenizer}, {model.n_vocabulary:,}",
        "chat template": "yes" if model.chat_template else "none",
    }


def _row(label: str, a: str, b: str) -> str:
    return f"{label:{LABEL}}{_cut(a):{COLUMN}} {_cut(b)}".rstrip()


def _cut(text: str, width: int = COLUMN) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _shared(found: Findings) -> Iterator[str]:
    if found.basis is None:
        return
    shared = "shared" if found.basis.is_shared else "none shared"
    yield from _wrapped(f"Basis: {shared}. {found.basis.reason}", 3)
    same = "one: the same vocabulary and rules" if found.one_tokenizer else "two"
    yield f"Tokenizer: {same}."


def _text(found: Findings) -> Iterator[str]:
    looks = {one.dataset_path: one for one in found.looks}
    for source in found.sources[:MOST_SOURCES]:
        path, n = source.cfg.dataset_path, n_documents(source.rows)
        length = "length not known" if n is None else counted(n, "document")
        one = looks.get(path)
        read = "none read" if one is None else f"the first {one.counts.texts} of training read"
        yield _cut(f"Text: {path}, {length}, {read}.", WIDTH)
    if len(found.sources) > MOST_SOURCES:
        yield f"… and {len(found.sources) - MOST_SOURCES} data sets more."
    if not found.looks:
        return
    coverage = together(found.looks)
    yield f"Paired: {coverage.a:.1%} of A's tokens, {coverage.b:.1%} of B's."
    reasons = [
        [_cut(f"  {reason}", WIDTH - 20), f"{a:,}", f"{b:,}"]
        for reason, a, b in top_reasons(coverage)
    ]
    if reasons:
        yield from text_table(["  why the others are not", "A", "B"], reasons).splitlines()
    yield from _wrapped(supply(found.looks, found.cfg), 2)


def _needs(found: Findings) -> Iterator[str]:
    needs = found.needs
    if needs is None:
        return
    pairs = counted(found.cfg.train_batch_size_tokens, "pair")
    yield f"A training of {counted(needs.n_steps, 'step')} of {pairs}:"
    yield from _wrapped(f"time    {_time(needs, found.seconds_to_open)}", 2, indent="  ")
    for device, room in needs.memory.items():
        takes = room.takes
        there = f" of {size(room.there)}"
        where = "" if device == PROCESSOR else f" on {device}"
        yield (
            f"  memory  {size(takes.total)}{there}{where}: models {size(takes.models)}, "
            f"crosscoder {size(takes.crosscoder)}, activations {size(takes.rows)}"
        )
    disk = needs.disk
    yield (
        f"  disk    {size(disk.total)} of {size(needs.disk_there)} free: run {size(disk.run)}, checkpoints "
        f"{size(disk.checkpoints)}; a cache takes {size(disk.cache)}"
    )


def _time(needs: Needs, seconds_to_open: float) -> str:
    models = f"{needs.harvested_pairs:,} pairs at {needs.harvest_rate:,.0f}/s"
    if needs.times is None or needs.step_seconds is None:
        return f"not measured, as it does not fit; the models alone take {models}"
    took = needs.times
    return (
        f"about {duration(took.total)}, and {duration(seconds_to_open)} to open: models {duration(took.harvest)} "
        f"({models}), steps {duration(took.steps)} ({duration(needs.step_seconds)} each), text {duration(took.reading)}"
    )


def _remarks(found: Findings, room: int) -> list[str]:
    """Problems and notes, in as many lines as there is room for."""
    remarks = [f"PROBLEM: {one}" for one in found.problems] + [
        f"Note: {one}" for one in found.notes
    ]
    lines = list(chain.from_iterable(_wrapped(one, FEWEST_REMARKS // 2) for one in remarks))
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], "… and more: --json has all of it."]


def _wrapped(text: str, most: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}        " if indent else "  ",
        max_lines=most,
        placeholder=" …",
        break_on_hyphens=False,
    )
