"""What the command line imports before it answers, and what a process of its name finds in the
package."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sae_lens_dfc
from sae_lens_dfc.cli.main import COMMANDS, main, options_class

HEAVY = ["torch", "sae_lens", "transformer_lens", "transformers", "datasets", "matplotlib"]
PARSER = "simple_parsing"

# A process of the command's name: what it prints last is JSON.
START = """
import contextlib, io, json, sys
sys.argv = ["/somewhere/bin/sae-lens-dfc"]
from sae_lens_dfc.__main__ import main

def status(*args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(args)
        except SystemExit as ended:
            return ended.code
"""


def in_a_command(code: str) -> Any:
    """What a process that is the command line makes of this code, which sets `found`."""
    code = f"{START}\n{code}\nprint(json.dumps(found))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_help_the_version_and_wrong_usage_are_answered_before_anything_large_is_imported() -> None:
    statuses, modules = in_a_command(
        "statuses = [status(*args) for args in (['--help'], ['--version'], [], ['fly'], ['--fly'])]\n"
        "found = statuses, list(sys.modules)"
    )
    assert statuses == [0, 0, 2, 2, 2]
    assert {*HEAVY, PARSER} & {*modules} == set()
    ours = {name for name in modules if name.startswith("sae_lens_dfc.")}
    assert ours == {
        f"sae_lens_dfc.{name}" for name in ("__main__", "cli", "cli.main", "core", "core.terminal")
    }


# Their flags are fields of SAELens' own dataclasses.
FLAGS_OF_SAELENS = {"check", "train"}
LIGHT = [name for name in COMMANDS if name not in FLAGS_OF_SAELENS]


def test_help_of_a_command_whose_flags_are_ours_imports_nothing_large() -> None:
    for name in LIGHT:
        ended, modules = in_a_command(
            f"ended = status({name!r}, '--help')\nfound = ended, list(sys.modules)"
        )
        assert (name, ended) == (name, 0)
        assert PARSER in modules
        assert (name, {*HEAVY, "numpy", "sae_lens_dfc.training.runner"} & {*modules}) == (
            name,
            set(),
        )


def test_python_m_is_as_light_as_the_command() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sae_lens_dfc", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "sae_lens_dfc.cli.main" in modules
    assert {*HEAVY, PARSER} & modules == set()


@pytest.mark.slow
def test_a_command_registers_the_architectures_before_it_opens_a_run() -> None:
    ended, registered, names = in_a_command(
        "import sae_lens_dfc\n"
        "names = [sae_lens_dfc.ModelPair.__name__, hasattr(sae_lens_dfc, 'ModelPear')]\n"
        "ended = status('report', '/no/run')\n"
        "from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY\n"
        "found = ended, [*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY], names"
    )
    assert ended == 1 and {"crosscoder", "dfc"} <= {*registered}
    assert names == ["ModelPair", False]


@pytest.mark.parametrize(
    ("name", "is_command"),
    [
        ("/usr/bin/sae-lens-dfc", True),
        ("sae-lens-dfc.exe", True),
        ("train.py", False),
        ("", False),
    ],
)
def test_only_a_process_of_the_commands_name_puts_off_its_imports(
    name: str, is_command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    assert sae_lens_dfc._is_the_command_line() is is_command


@pytest.mark.parametrize(
    ("flags", "is_command"),
    [
        ("-m sae_lens_dfc", True),
        ("-X dev -m sae_lens_dfc.__main__", True),
        ("-Im sae_lens_dfc", True),
        ("-msae_lens_dfc", True),
        ("-m sae_lens_dfc.analysis.evaluation.demo", False),
        ("-m pytest", False),
    ],
)
@pytest.mark.parametrize("args", [[], ["train", "sae_lens_dfc"]])
def test_only_python_m_of_the_package_itself_puts_off_its_imports(
    flags: str, is_command: bool, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", *args])
    monkeypatch.setattr(sys, "orig_argv", ["python", *flags.split(), *args])
    assert sae_lens_dfc._is_the_command_line() is is_command


@pytest.mark.slow
def test_a_process_that_a_command_spawns_has_the_architectures(tmp_path: Path) -> None:
    script = tmp_path / "sae-lens-dfc"
    script.write_text(
        "from multiprocessing import get_context\n"
        "from sae_lens_dfc.__main__ import main\n"
        "def has(name):\n"
        "    from sae_lens.registry import SAE_CLASS_REGISTRY\n"
        "    return name in SAE_CLASS_REGISTRY\n"
        "if __name__ == '__main__':\n"
        "    with get_context('spawn').Pool(1) as pool:\n"
        "        print(has('crosscoder'), pool.map(has, ['crosscoder']))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout == "False [True]\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_first_sentence_of_a_commands_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = COMMANDS[command][1]
    [paragraph, *_] = (options_class(command).__doc__ or "").split("\n\n")
    assert sentence == " ".join(paragraph.split()) and sentence.endswith(".")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_a_package_that_does_not_load_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        if name == "sae_lens_dfc.api":
            raise OSError("libcudart.so: cannot open shared object file")
        return import_module(name)

    monkeypatch.setattr("sae_lens_dfc.cli.main.import_module", broken)
    with pytest.raises(OSError, match="libcudart"):
        main(["report", "/no/run"])


def test_ctrl_c_while_a_command_is_imported_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_lens_dfc.cli.main.import_module", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "sae-lens-dfc: stopped\n"
