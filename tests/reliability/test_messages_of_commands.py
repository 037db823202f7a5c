"""What each command says of wrong input: one line that ends, status 1; or argparse's usage, status
2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from tqdm.auto import tqdm
from wandb.errors import UsageError

from sae_lens_dfc.cli.main import COMMANDS, main

MODELS = "--model-a.model-name {a} --model-b.model-name {b}"
SIZES = "--training-tokens 640 --train-batch-size-tokens 64 --sae.d-sae 64 --sae.k 4"
TRAIN = f"train {MODELS} --dataset-path {{text}} {SIZES} --output-path {{new}}"
CACHE = f"cache {MODELS} --dataset-path {{text}} --max-unique-pairs 100 --cache-path {{new}}"
ALIGN = "align --tokenizer-a {a} --tokenizer-b {b}"
STEER = "steer {run} --model a --latent 1 --strength 1 --prompt Hi"
EXPORT = "export {run} --model a --output {new}"
SCREEN = "screen {run} --output {new}"
GENERATE = f"generate {MODELS} --prompts {{prompts}} --output {{new}}.jsonl"
DEMO = "demo --model-a {a} --model-b {b} --output {new}"
NO_DEVICE = "device 'nowhere' is not available: Expected one of cpu, cuda, "
NO_RUN = "is not a crosscoder: it has no cfg.json and no sae_weights.safetensors."
BIG = str(2**70)

# The command, and a piece of what it says; of flags that are given twice the last wins.
REFUSED: dict[str, tuple[str, str]] = {
    # configurations
    "no configuration": ("train --config {none}", "No such file or directory: '{none}'."),
    "a folder as configuration": ("train --config {folder}", "{folder} is not a file."),
    "an empty configuration": ("train --config {empty}", "must be a mapping of flags"),
    "YAML that is none": ("train --config {yaml}", "sound YAML: line 1, column 9: expected ','"),
    "bytes as configuration": ("train --config {bytes}", "is not text in UTF-8: invalid start"),
    "no recipe": ("train --recipe x", "There is no recipe 'x'."),
    "a check, no configuration": ("check --config {none}", "No such file or directory: '{none}'."),
    # models
    "no model": (f"{TRAIN} --model-a.model-name {{none}}", "Could not load a tokenizer from"),
    "a model that is a file": (f"{TRAIN} --model-a.model-name {{file}}", "not a valid JSON file. Give"),
    "a model that is a folder": (f"{TRAIN} --model-a.model-name {{folder}}", "the folder holds none. Copy tokenizer.json"),
    "GGUF that is none": (f"{TRAIN} --model-a.model-name {{gguf}}", "not a sound GGUF file: it begins"),
    "a tokenizer that lacks a part": (f"{TRAIN} --model-a.model-name {{lacking}}", "is missing. Give"),
    "a base without an adapter": (f"{TRAIN} --model-a.base {{b}}", "base='{b}' is for an adapter"),
    "no chat template": (f"{TRAIN} --model-a.chat-template x", "is neither a Jinja template"),
    "no number format": (f"{TRAIN} --model-a.dtype x", "Invalid dtype: x. Must be one of"),
    "no hook": (f"{TRAIN} --model-a.hook-name x", "Hook 'x' is not in model 'tiny-llama'"),
    # devices
    "train, no device": (f"{TRAIN} --device nowhere", NO_DEVICE),
    "train, no device for a model": (f"{TRAIN} --model-a.device nowhere", NO_DEVICE),
    "train, a device without numbers": (f"{TRAIN} --device meta", "it stores no data. Give one"),
    "cache, no device": (f"{CACHE} --model-a.device nowhere", NO_DEVICE),
    "evaluate, no device": ("evaluate {run} --device nowhere", NO_DEVICE),
    "a judge, no device": ("evaluate {run} --null none --judge local:{a} --device nowhere", NO_DEVICE),
    "latents, no device": ("latents {run} --device nowhere", NO_DEVICE),
    "generate, no device": (f"{GENERATE} --model-a.device nowhere", NO_DEVICE),
    "demo, no device": (f"{DEMO} --device nowhere", NO_DEVICE),
    # numbers
    "lr": (f"{TRAIN} --lr nan", "lr must be above 0 and finite, got nan."),
    "k": (f"{TRAIN} --sae.k 1000", "k must be above 0 and at most d_sae, got k=1000 and d_sae=64."),
    "d_sae": (f"{TRAIN} --sae.d-sae 0", "of d_sae=0 is less than one latent."),
    "seed": (f"{TRAIN} --seed {BIG}", "seed must be a number of 64 bits, got"),
    "a schedule": (f"{TRAIN} --lr-scheduler-name x", "There is no lr_scheduler_name 'x'."),
    "pairs of a cache": (f"{CACHE} --max-unique-pairs 0", "max_unique_pairs must be above 0, got 0."),
    "pairs to measure": ("evaluate {run} --eval-pairs -5", "eval_pairs must be above 0, got -5."),
    "pairs of a map": (f"{EXPORT} --fit-pairs -1", "fit_pairs must be at least 0, got -1."),
    "a strength": (f"{STEER} --strength nan", "A strength must be a finite number, got nan."),
    "tokens to write": (f"{STEER} --max-new-tokens 0", "max_new_tokens must be at least 1, got 0."),
    "temperature": (f"{STEER} --temperature nan", "temperature must be at least 0 and finite, got nan."),
    "seed of steering": (f"{STEER} --seed {BIG}", "seed must be a number of 64 bits, got"),
    "latents to keep": (f"{SCREEN} --keep 0", "keep must be at least 1, got 0."),
    "seed of a screening": (f"{SCREEN} --seed {BIG}", "seed must be a number of 64 bits, got"),
    "latents to list": ("latents {run} --top 0", "top must be at least 1, got 0."),
    "seed of answers": (f"{GENERATE} --seed {BIG}", "seed must be a number of 64 bits, got"),
    "answers at a time": (f"{GENERATE} --batch-size 0", "batch_size must be at least 1, got 0."),
    "seed of an organism": (f"model-organism topic --output {{new}} --seed {BIG}", "a number of 64 bits"),
    # text
    "no text": (f"{ALIGN} {{none}}", "Couldn't find any data file at {none}. Give a hub name"),
    "an empty text": (f"{ALIGN} {{empty}}", "has no paired position: 0 tokens of A"),
    "a folder as text": (f"{ALIGN} {{folder}}", "doesn't contain any data files. Give a hub name"),
    "bytes as text": (f"{ALIGN} {{bytes}}", "is not text in UTF-8: invalid start byte at byte 0."),
    "JSON that is none": (f"{ALIGN} {{lines}}", "JSON parse error: Invalid value. in row 1. Give"),
    "no column": (f"{ALIGN} {{text}} --text-column x", "has no text column 'x'"),
    "no prompts": (f"{GENERATE} --prompts {{none}}", "Couldn't find any data file at {none}."),
    "no column of prompts": (f"{GENERATE} --text-column x", "has no text column 'x'"),
    # runs and caches
    "train, no cache": (f"train --cache-path {{none}} {SIZES}", "{none} holds no cache. Make one"),
    "train, a cache that is a file": (f"train --cache-path {{file}} {SIZES}", "{file} holds no cache."),
    "evaluate, no run": ("evaluate {none}", NO_RUN),
    "evaluate, a run that is a file": ("evaluate {file}", NO_RUN),
    "evaluate, a run twice": ("evaluate {run} {run}", "A run is given twice: {run} {run}. Name"),
    "report, no run": ("report {none}", NO_RUN),
    "export, no run": (f"{EXPORT.replace('{run}', '{folder}')}", NO_RUN),
    "steer, no run": (f"{STEER.replace('{run}', '{none}')}", NO_RUN),
    "screen, no run": (f"{SCREEN.replace('{run}', '{none}')}", NO_RUN),
    "latents, no run": ("latents {none}", NO_RUN),
    "latents, no evidence": ("latents {run} --sort evidence --evidence {folder}", "has no evidence."),
    # outputs
    "train into a file": (f"{TRAIN} --output-path {{file}}", "Output {file} is no folder. Name one."),
    "train beneath a file": (f"{TRAIN} --output-path {{file}}/x", "{file}/x cannot be made in {file}."),
    "train, checkpoints in a file": (f"{TRAIN} --checkpoint-path {{file}}", "{file} is no folder."),
    "train into the root": (f"{TRAIN} --output-path /", "cannot be replaced as a whole."),
    "cache beneath a file": (f"{CACHE} --cache-path {{file}}/x", "{file}/x cannot be made in {file}."),
    "evaluate into the run": ("evaluate {run} --output {run}", "{run} holds a run, which is never overwritten."),
    "evaluate beneath a file": ("evaluate {run} --output {file}/x", "cannot be made in {file}."),
    "report into a folder": ("report {run} --output {folder}", "cannot be replaced by one."),
    "report beneath a file": ("report {run} --output {file}/x", "{file}/x cannot be made in {file}."),
    "export beneath a file": (f"{EXPORT} --output {{file}}/x", "{file}/x cannot be made in {file}."),
    "screen into a file": (f"{SCREEN} --output {{file}}", "Output {file} is no folder. Name one."),
    "generate into no table": (f"{GENERATE} --output {{file}}", "output must be a .jsonl file, got"),
    "generate over a file": (f"{GENERATE} --output {{text}}", "Output {text} is there already."),
    "organism into a file": ("model-organism topic --output {file}", "Output {file} is no folder."),
    "demo into a file": (f"{DEMO} --output {{file}}", "Output {file} is no folder."),
    # judges, nulls, concerns
    "no judge": ("evaluate {run} --null none --judge x:y", "Judge 'x:y' is unknown. Give openai:MODEL"),
    "a judge's folder": ("evaluate {run} --null none --judge local:{none}", "Could not load a tokenizer"),
    "a judge's key": ("evaluate {run} --null none --judge openai:x", "OPENAI_API_KEY is not set"),
    "a judge for nothing": ("evaluate {run} --judge openai:x", "--judge only applies with --output or --null."),
    "no null": ("evaluate {run} --null x", "There is no null 'x'. Choose from self, shuffle, seed."),
    "no concerns": (f"{SCREEN} --judge local:{{a}} --concerns {{none}}", "No such file or directory"),
    "empty concerns": (f"{SCREEN} --judge local:{{a}} --concerns {{empty}}", "got nothing."),
    "concerns that are no YAML": (f"{SCREEN} --judge local:{{a}} --concerns {{yaml}}", "line 1, column 9"),
}  # fmt: skip

# The command, and a piece of its last line.
MISUSED: dict[str, tuple[str, str]] = {
    "no command": ("", "required: COMMAND"),
    "another command": ("measure", "invalid choice: 'measure'"),
    "no size": (f"train {MODELS}", "required: --sae.d-sae"),
    "no number": (f"{TRAIN} --lr x", "argument --lr: invalid float value: 'x'"),
    "no architecture": (f"{TRAIN} --architecture x", "invalid choice: 'x'"),
    "another flag": (f"{TRAIN} --optimizer x", "unrecognized arguments: --optimizer x"),
    "no file": (ALIGN, "required: FILE"),
    "another model": ("export {run} --model c --output {new}", "invalid choice: 'c'"),
    "no latent": (f"{STEER} --latent x", "invalid int value: 'x'"),
    "another order": ("latents {run} --sort x", "invalid choice: 'x'"),
    "another partition": ("latents {run} --partition x", "invalid choice: 'x'"),
    "another organism": ("model-organism x --output {new}", "invalid choice: 'x'"),
}


@pytest.fixture(scope="module")
def places(
    run: Path, llama_folder: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What stands for the names in braces."""
    folder = tmp_path_factory.mktemp("wrong")
    contents = {
        "file": b"x",
        "empty": b"",
        "yaml": b"a: [1, 2",
        "bytes": b"\xff\xfe",
        "lines.jsonl": b'{"text": "a"}\n{"text":',
        "prompts.jsonl": b'{"prompt": "Hi"}\n',
        "gguf.gguf": b"GGUF",
        "lacking/tokenizer.json": b"{}",
        "folder/.keep": b"",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    named = {name.split(".")[0].split("/")[0]: folder / name for name in contents}
    named |= {name: folder / name for name in ("lacking", "folder", "none", "new")}
    named |= {"run": run, "text": run.with_name("text.jsonl"), "a": llama_folder, "b": gpt2_folder}
    return {name: str(path) for name, path in named.items()}


def filled(command: str, places: dict[str, str]) -> list[str]:
    return [part.format(**places) for part in command.split()]


def lines(text: str) -> list[str]:
    """What is said, without bars of progress."""
    return [x for x in text.splitlines() if x.strip() and not re.match(r"[\w ]+:.*\[.*/s\]\Z", x)]


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_line_that_ends_and_leaves_nothing(
    case: str,
    places: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    command, why = REFUSED[case]
    capfd.readouterr()
    assert main(filled(command, places)) == 1
    said = capfd.readouterr()
    [line] = lines(said.err)
    assert line.startswith("sae-lens-dfc: error: ") and line.endswith((".", "?")), line
    assert why.format(**places) in line and said.out == ""
    assert not Path(places["new"]).exists() and not Path(places["none"]).exists()


@pytest.mark.parametrize("case", MISUSED)
def test_wrong_usage_is_argparses_and_status_2(
    case: str, places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    command, why = MISUSED[case]
    with pytest.raises(SystemExit) as exit_:
        main(filled(command, places))
    said = capfd.readouterr()
    assert exit_.value.code == 2 and said.out == ""
    assert ": error: " in said.err.splitlines()[-1] and why in said.err.splitlines()[-1]


def test_every_command_is_looked_at() -> None:
    assert {command.split()[0] for command, _ in REFUSED.values()} == set(COMMANDS)


@pytest.mark.slow
def test_a_logger_that_does_not_start_is_one_line(
    places: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        raise UsageError("api_key not configured (no-tty). call wandb.login()")

    monkeypatch.setattr(wandb, "init", init)
    flags = ["--logger.log-to-wandb", "true", "--context-size", "48", "--output-path"]
    assert main([*filled(TRAIN, places), *flags, str(tmp_path / "run")]) == 1
    *_, line = lines(capfd.readouterr().err)  # after what it logged
    said = "Weights & Biases does not start: api_key not configured (no-tty). call wandb.login(). Log in"
    assert line.startswith(f"sae-lens-dfc: error: {said}") and line.endswith(".")


def run_instead(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], *args: Any
) -> Callable[[], int]:
    """A command that begins a bar of progress, and then fails."""

    def do(_: Any) -> int:
        bar = tqdm(total=3, desc="Half of it")
        bar.update()
        raise kind(*args)

    monkeypatch.setattr("sae_lens_dfc.cli.report.run", do)
    return lambda: main(["report", "run"])


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, KeyError, AttributeError])
def test_a_mistake_of_the_program_stays_a_traceback(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = run_instead(monkeypatch, kind, "broken")
    with pytest.raises(kind, match="broken"):
        command()


NO_ROOM = "Use smaller batches, fewer latents or pairs, or a machine with more memory."
OTHERS: dict[str, tuple[type[Exception], tuple[Any, ...]]] = {
    "No space left on device: 'x'.": (OSError, (28, "No space left on device", "x")),
    "Value error.": (ValueError, ()),
    "Choose: a, b.": (ValueError, ("Choose:\n - a\n - b",)),
    f"Out of memory: Memory error. {NO_ROOM}": (MemoryError, ()),
}


@pytest.mark.parametrize("said", OTHERS)
def test_an_error_that_is_not_ours_is_a_line_of_its_own_after_a_bar_of_progress(
    said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, args = OTHERS[said]
    assert run_instead(monkeypatch, kind, *args)() == 1
    assert lines(capfd.readouterr().err) == [f"sae-lens-dfc: error: {said}"]
