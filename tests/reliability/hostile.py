"""Files as a stranger would make them, and what a command makes of them."""

import json
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytest
from safetensors.torch import load_file, save_file

from sae_lens_dfc.cli import main as command_line
from sae_lens_dfc.cli.main import main

T = TypeVar("T")

# What a command imports is no part of the time that it takes to refuse a file.
for _module, _ in command_line.COMMANDS.values():
    import_module(_module)

MAX_SECONDS = 5.0
"""Of processor time, on a machine that has other things to do."""
MAX_BYTES = 200_000_000
DEEP = "[" * 100_000 + "]" * 100_000
# Python refuses such numbers itself since 3.10.7.
TOO_LONG = "digits" if hasattr(sys, "get_int_max_str_digits") else "64 bits"

# What stands in a file in place of JSON, and a word of the error.
NOT_JSON: dict[str, tuple[bytes, str]] = {
    "nested 100,000 deep": (DEEP.encode(), "nested too deep"),
    "objects nested 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "nested 500 deep": (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deep"),
    "a number of a million digits": (b'{"d_in": ' + b"9" * 1_000_000 + b"}", TOO_LONG),
    "a float beyond all": (b'{"d_in": 1e99999}', "inf, which is no number"),
    "NaN": (b'{"d_in": NaN}', "nan, which is no number"),
    "infinity": (b'{"d_in": -Infinity}', "-inf, which is no number"),
    "one key twice": (b'{"format": 1, "format": 1}', "'format' appears twice"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not sound JSON"),
    "nothing": (b"", "not sound JSON"),
    "a NUL": (b"\0", "not sound JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not text"),
    "bytes that are no text": (bytes(range(256)), "is not text"),
    "a list": (b"[]", "must hold a JSON object"),
    "null": (b"null", "must hold a JSON object"),
    "a text": (b'"cfg"', "must hold a JSON object"),
    "half of it": (b'{"d_in": ', "not sound JSON"),
    "a file too large": (b'{"a": "' + b"x" * 60_000_000 + b'"}', "no file of its kind has more"),
    "ten million lists": (b"[" + b"[]," * 10_000_000 + b"[]]", "no file of its kind has more"),
}


def grown(do: Callable[[], T]) -> tuple[T, float, int]:
    """What `do` returns, its seconds of processor time, and by how much this process grew at its
    most meanwhile."""
    status, start = Path("/proc/self/status"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # forget how large it was at its most
    before = status.read_text()
    result = do()
    seconds, after = time.process_time() - start, status.read_text()
    [[resident], [peak]] = (
        re.findall(rf"{name}:\s+(\d+) kB", text)
        for name, text in (("VmRSS", before), ("VmHWM", after))
    )
    return result, seconds, 1024 * (int(peak) - int(resident))


def refusal(capfd: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one line with which a command refuses, in a second or two and without taking memory."""
    capfd.readouterr()
    status, seconds, n_bytes = grown(lambda: main([str(arg) for arg in args]))
    shown = capfd.readouterr()
    assert status == 1, shown
    lines = [line for line in shown.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("sae-lens-dfc: error: "), shown
    assert shown.out == "" and lines[0].isprintable()
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s: {lines[0]}"
    assert n_bytes < MAX_BYTES, f"{n_bytes / 1e6:.0f} MB: {lines[0]}"
    return lines[0]


COMMANDS: dict[str, list[str]] = {
    "evaluate": [],
    "report": [],
    "latents": [],
    "export": ["--model", "a", "--output", "out"],
    "steer": ["--model", "a", "--latent", "0", "--strength", "1", "--prompt", "x"],
    "screen": ["--output", "out"],
}
"""The commands that take a run, with what else they need."""


def refused(do: Callable[[], Any]) -> str:
    """The error of one line with which something refuses, quickly and without taking memory."""

    def tried() -> str:
        with pytest.raises((ValueError, OSError)) as error:
            do()
        return str(error.value)

    message, seconds, n_bytes = grown(tried)
    assert message and "\n" not in message, message
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s: {message}"
    assert n_bytes < MAX_BYTES, f"{n_bytes / 1e6:.0f} MB: {message}"
    return message


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, symlinks=True)
    return to


def changed_json(path: Path, **changes: Any) -> None:
    """A JSON file with some entries replaced; `a__b` is `b` in `a`."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = values
        for part in outer:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(values))


def changed_tensors(path: Path, **changes: Any) -> None:
    """A file of weights with some tensors replaced, or left out where the change is none."""
    tensors = {**load_file(path), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def safetensors_with(header: Mapping[str, Any], content: bytes = b"") -> bytes:
    """A file whose header says this, whatever follows it."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


CANARY = "canary"


def canary_module(folder: Path) -> str:
    """Python that leaves a file where it is run, and is a model, a configuration and a tokenizer
    besides."""
    return f"""
from pathlib import Path
Path({str(folder / CANARY)!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "evil"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


class Pickled:
    """Unpickled, it leaves a file."""

    def __init__(self, folder: Path):
        self.path = folder / CANARY

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (self.path, "run"))
