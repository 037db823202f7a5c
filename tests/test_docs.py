"""What a reader can copy runs: every block of code of README, docs and the other pages, in order,
on tiny models."""

import doctest
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.__main__ import program
from sae_lens_dfc.cli.main import COMMANDS, main, options_of
from sae_lens_dfc.cli.parser import settings_taken
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from tests.docs_blocks import ROOT, SHELL, Block, blocks_of, commands, pages
from tests.docs_rules import EVERYWHERE, RULES, SMALL, SMALL_FULL, Rules
from tests.helpers import train_tiny

PAGES = [page for page in pages() if blocks_of(page)]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """The tiny Llama with its weights moved a little."""
    folder = tmp_path_factory.mktemp("models") / "fine-tune"
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A LoRA on the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(llama_folder)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["down_proj"])
        get_peft_model(base, config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path, fine_tune: Path
) -> Path:
    """What a reader has beside a page: text, prompts, chats, and the runs of `make demo` and of an
    organism."""
    folder = tmp_path_factory.mktemp("desk")
    texts = reference_pages()[:12]
    _write_lines(folder / "text.jsonl", [{"text": text} for text in texts])
    _write_lines(folder / "prompts.jsonl", [{"prompt": f"{word} is"} for word in ("This", "That")])
    chat = [{"role": role, "content": texts[0][:80]} for role in ("user", "assistant")]
    _write_lines(folder / "chats.jsonl", [{"messages": chat}] * 200)
    (folder / "my-text.txt").write_text(texts[0])
    (folder / "template.jinja").write_text(TEMPLATE)
    for name, flags in (("demo", ()), ("demo-43", ("--seed", "43"))):
        (folder / f"made-{name}").mkdir()
        run = train_tiny(folder / f"made-{name}", llama_folder, gpt2_folder, *flags)
        shutil.copytree(run, folder / "runs" / name)
    organism = folder / "runs" / "organism"
    shutil.copytree(llama_folder, organism / "a")
    shutil.copytree(fine_tune, organism / "b")
    shutil.copy(folder / "text.jsonl", organism)
    return folder


class Page:
    """A page as its reader goes through it: blocks in order, one folder, one Python."""

    def __init__(self, name: str, folder: Path, made: Path, stand_ins: dict[str, str]):
        self.rules = RULES.get(name, Rules())
        self.name, self.folder, self.made, self.stand_ins = name, folder, made, stand_ins
        self.names: dict[str, Any] = {"__name__": "page"}
        self.python(Block("python", self.rules.given, 0))

    def run(self, block: Block) -> None:
        by_language: dict[str, Callable[[Block], None]] = {
            "python": self.python,
            "yaml": self.yaml,
            "text": self.output,
            **dict.fromkeys(SHELL, self.shell),
        }
        assert block.language in by_language, f"There is no rule for a block of {block.language}."
        by_language[block.language](block)

    def substituted(self, text: str) -> str:
        for old, new in {**self.rules.replace, **EVERYWHERE}.items():
            text = text.replace(old, new)
        for name, stand_in in self.stand_ins.items():
            text = text.replace(f"{{{name}}}", stand_in)
        return text

    def is_not_run(self, text: str) -> bool:
        return any(text.startswith(start) for start in self.rules.not_run)

    def python(self, block: Block) -> None:
        text = self.substituted(block.text)
        if text.lstrip().startswith(">>>"):
            self.doctest(text)
            return
        # So that a traceback has the page's own lines.
        code = compile("\n" * (block.line - 1) + text, self.name, "exec")
        if self.is_not_run(block.text):
            exec("\n".join(re.findall(r"^(?:from \S+ )?import .*$", text, re.MULTILINE)), {})
            return
        exec(code, self.names)

    def doctest(self, text: str) -> None:
        test = doctest.DocTestParser().get_doctest(text, self.names, self.name, None, None)
        runner = doctest.DocTestRunner()
        assert runner.run(test, clear_globs=False).failed == 0
        self.names = test.globs

    def yaml(self, block: Block) -> None:
        """Written to the file that its first line names, and read by the commands that take it."""
        file = re.match(r"# (\S+\.yaml)\n", block.text)
        assert file is not None, "A block of YAML begins with its file's name, as in '# run.yaml'."
        path = self.folder / file[1]
        # One device is what every machine has.
        path.write_text(re.sub(r"cpu:\d", "cpu", self.substituted(block.text)))
        known = set().union(*settings_taken().values()) | {"recipe"}
        assert set(yaml.safe_load(path.read_text())) <= known
        for command in ("train", "cache"):
            _parsed([command, "--config", str(path)])

    def output(self, block: Block) -> None:
        assert any(block.text.startswith(start) for start in self.rules.declared), (
            "Say in tests/docs_rules.py (declared) where this output comes from."
        )

    def shell(self, block: Block) -> None:
        substituted = commands(self.substituted(block.text))
        for original, words in zip(commands(block.text), substituted, strict=True):
            _check(words)
            ours = _of_ours(words)
            if ours is None:
                continue
            if "--help" in ours:
                with pytest.raises(SystemExit, match="0"):
                    main(ours)
                continue
            if self.is_not_run(" ".join(original)):
                _parsed(ours)
                continue
            if not self.made_before(ours):
                assert main([*ours, *SMALL.get(ours[0], "").split()]) == 0, (
                    f"failed: {' '.join(ours)}"
                )

    def made_before(self, ours: list[str]) -> bool:
        """Several pages measure the demo's run in full: the second finds what the first had."""
        if ours[:2] != ["evaluate", "runs/demo"] or "--output" not in ours:
            return False
        output = ours[ours.index("--output") + 1]
        made = self.made / "-".join(ours).replace("/", "-")
        if not made.exists():
            flags = [*SMALL["evaluate"].split(), *SMALL_FULL.split()]
            assert main([*ours, *flags, "--output", str(made)]) == 0
        shutil.copytree(made, self.folder / output)
        return True


def _of_ours(words: list[str]) -> list[str] | None:
    """The arguments for our command line, if that is what it is."""
    if words[0] == "sae-lens-dfc":
        return words[1:]
    if "sae_lens_dfc" in words and words[words.index("sae_lens_dfc") - 1] == "-m":
        return words[words.index("sae_lens_dfc") + 1 :]
    return None


def _parsed(arguments: list[str]) -> Any:
    """The options of a command line, as `main` has them before it does anything."""
    return options_of(arguments[0], arguments)


def _check(words: list[str]) -> None:
    """Refuse what no reader could run: commands of others are looked up, not run."""
    known: dict[str, Callable[[], bool]] = {
        "sae-lens-dfc": lambda: words[1] in COMMANDS or words[1] == "--help",
        "torchrun": lambda: _of_ours(words) is not None,
        # Takes a network, and minutes.
        "make": lambda: words[1] in _make_targets(),
        "pip": lambda: words[1] == "install" and _extras(words) <= _extras_there(),
        "git": lambda: words[1] == "clone",
        "cd": lambda: len(words) == 2,
        # Runs the whole suite.
        ".ci/run": lambda: (ROOT / words[0]).exists(),
        "python": lambda: _of_ours(words) is not None or _is_script(words[1:]),
    }
    assert words[0] in known, f"There is no rule for the command {words[0]}."
    assert known[words[0]](), f"It cannot be run: {' '.join(words)}"


def _is_script(words: list[str]) -> bool:
    """Whether there is such a file and it has these flags; of pytest, whether the files to test are
    there; of the benchmarks, their flags are parsed."""
    if words[:2] == ["-m", "benchmarks"]:
        options_of("benchmarks", words[1:], program())
        return True
    if words[0] == "-m" and words[1].startswith("benchmarks."):
        words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
    if words[0] in ("-m", "-c"):
        return all(word in ("-m", "pytest", "-c") or (ROOT / word).exists() for word in words)
    script = ROOT / words[0]
    flags = [word for word in words[1:] if word.startswith("--")]
    return script.is_file() and all(flag in script.read_text() for flag in flags)


def _make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def _extras(words: list[str]) -> set[str]:
    return {
        e for word in words for extras in re.findall(r"\[(.*)\]", word) for e in extras.split(",")
    }


def _extras_there() -> set[str]:
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^(\w+) = \[", declared.split("\n[")[0], flags=re.MULTILINE))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(desk, tmp_path / "desk", ignore=shutil.ignore_patterns("made*"))
    monkeypatch.chdir(tmp_path / "desk")
    yield tmp_path / "desk"


def _is_slow(page: str) -> bool:
    """Whether runs are measured in full or screened, which takes some ten seconds; the rest takes
    one or two."""
    text = "".join(block.text for block in blocks_of(page))
    return re.search(r"sae-lens-dfc (evaluate|screen|demo|check) ", text) is not None


def _params() -> list[Any]:
    return [
        pytest.param(
            page,
            marks=[
                *(pytest.mark.filterwarnings(w) for w in RULES.get(page, Rules()).warnings),
                *([pytest.mark.slow] if _is_slow(page) else []),
            ],
        )
        for page in PAGES
    ]


@pytest.mark.first_is_fast
@pytest.mark.parametrize("name", _params())
def test_the_code_of_a_page_runs_in_its_order(
    name: str,
    desk: Path,
    folder: Path,
    llama_folder: Path,
    gpt2_folder: Path,
    fine_tune: Path,
    adapter: Path,
) -> None:
    models = (llama_folder, gpt2_folder, fine_tune, adapter)
    stand_ins = dict(zip(("llama", "gpt2", "fine_tune", "adapter"), models, strict=True))
    page = Page(name, folder, desk / "made", {key: str(path) for key, path in stand_ins.items()})
    for block in blocks_of(name):
        try:
            page.run(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{name}, line {block.line}: {error!r}") from error


def test_every_rule_has_its_place() -> None:
    of_all = "".join(block.text for page in PAGES for block in blocks_of(page))
    assert [old for old in EVERYWHERE if old not in of_all] == []
    assert set(RULES) <= set(PAGES)
    for page, rules in RULES.items():
        text = "\n".join(block.text for block in blocks_of(page))
        begun = [
            " ".join(c) for b in blocks_of(page) if b.language in SHELL for c in commands(b.text)
        ]
        begun += [block.text for block in blocks_of(page)]
        assert [old for old in rules.replace if old not in text] == [], page
        for start in (*rules.not_run, *rules.declared):
            assert any(one.startswith(start) for one in begun), (page, start)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Block("rust", "fn main() {}", 1), "no rule for a block of rust"),
        (Block("text", "12.3", 1), "Say in tests/docs_rules.py"),
        (Block("bash", "curl example.org", 1), "no rule for the command curl"),
        (Block("bash", "make coffee", 1), "cannot be run"),
        (Block("", "sae-lens-dfc brew", 1), "cannot be run"),
        (Block("", "python -m benchmarks.brew", 1), "cannot be run"),
        (Block("yaml", "lr: 1", 1), "begins with its file's name"),
    ],
)
def test_a_block_without_a_rule_fails(block: Block, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        Page("new.md", tmp_path, tmp_path, {}).run(block)


def test_a_setting_that_does_not_exist_fails(tmp_path: Path) -> None:
    page = Page("new.md", tmp_path, tmp_path, {})
    with pytest.raises(AssertionError):
        page.run(Block("yaml", "# run.yaml\nlearning_rate: 1\n", 1))
    with pytest.raises(SystemExit):
        page.run(Block("yaml", "# run.yaml\nsae: {d_sae: 640, heads: 2}\n", 1))
