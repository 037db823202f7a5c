"""The site: it builds, is complete, and needs nothing from elsewhere."""

import ast
import doctest
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mkdocstrings import Inventory
from typing_extensions import override

import sae_lens_dfc
from sae_lens_dfc.cli.arguments import SHORT
from sae_lens_dfc.cli.main import COMMANDS, main, options_class
from sae_lens_dfc.cli.train import ARCHITECTURES
from tests.docs_blocks import ROOT

REFERENCE = ROOT / "docs" / "reference"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_architecture_lists_the_packages_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert hook("architecture").with_files(page) == page, "Run python docs/_hooks/architecture.py."


def test_each_file_and_folder_says_what_it_is_in_one_sentence_of_its_docstring() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert not re.search(r"^\| `\S+` \| +\|$|^#+ `\S+/`\n\n\n", page, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page points to, what it loads, and where in it one can point to."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"] or "")
        # A canonical address is no resource; there is none.
        if tag == "link" and given.get("href"):
            self.loaded.append(given["href"] or "")


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    public = {f"{getattr(sae_lens_dfc, n).__module__}.{n}" for n in sae_lens_dfc.__all__}
    assert public - documented == set()


@pytest.mark.slow
def test_every_link_leads_to_a_page_and_a_place_in_it(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken: list[str] = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            anchored = there not in pages or parts.fragment in {"", *pages[there].anchors}
            # A notebook's headings are anchors of another spelling, which mkdocs-jupyter makes.
            if not there.exists() or not (
                anchored or unquote(parts.fragment) in pages[there].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    outside = {
        (str(path.relative_to(site)), loaded)
        for path in site.rglob("*.html")
        for loaded in Links(path).loaded
        if urlsplit(loaded).scheme not in ("", "data") or loaded.startswith("//")
    }
    assert outside == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?https?:", styles) == []


@pytest.mark.slow
def test_the_picture_is_part_of_its_page_and_says_what_it_shows(site: Path) -> None:
    page = (site / "concepts.html").read_text(encoding="utf-8")
    assert '<svg class="way"' in page and "<title id=" in page and "<desc id=" in page


def test_every_public_name_is_of_a_module_in_the_reference() -> None:
    modules = set(re.findall(r"^::: (\S+)$", "".join(map(_read, REFERENCE.glob("*.md"))), re.M))
    for name in modules:
        assert importlib.util.find_spec(name) is not None, name
    assert {getattr(sae_lens_dfc, n).__module__ for n in sae_lens_dfc.__all__} <= modules


def test_every_command_and_architecture_has_its_flags_in_the_reference() -> None:
    page = _read(REFERENCE / "command-line.md")
    assert set(re.findall(r"<!-- command ([\w-]+) -->", page)) == set(COMMANDS)
    assert set(re.findall(r"<!-- architecture (\w+) -->", page)) == set(ARCHITECTURES)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train {name}" for name in ARCHITECTURES)])
def test_the_tables_of_flags_are_those_of_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, (name, *architecture) = hook("reference"), command.split()
    of_sae = [f"--architecture={one}" for one in architecture]
    with pytest.raises(SystemExit):
        main([name, *of_sae, "--help"])
    options = re.findall(r"^  (-.*?)(?:  .*)?$", capsys.readouterr().out, flags=re.M)
    said = set(re.findall(r"--[\w.-]+", " ".join(options)))
    # A truth value's flag has a second one that denies it.
    said -= {flag for flag in said if re.sub(r"(--|\.)no", r"\1", flag) in said - {flag}}
    table = {flag for flag, _, _ in reference.flags(options_class(name)) if flag.startswith("--")}
    sae = architecture or (["dfc"] if name in ("train", "check") else [])
    table |= {flag for one in sae for flag, _, _ in reference.flags(ARCHITECTURES[one], "sae.")}
    # `--sae` is another name of `--architecture`; the other two stand in the page's text.
    # Short names have a table of their own.
    short = set(SHORT.get(name, ()))
    assert short <= said
    assert said - {"--config", "--recipe", "--sae", "--help"} - short == table


def test_every_flag_in_the_reference_says_what_it_does() -> None:
    reference = hook("reference")
    silent = {
        (name, flag)
        for name in COMMANDS
        for flag, _, text in reference.flags(options_class(name))
        # SAELens' own settings of W&B have no sentence.
        if not text and not flag.startswith("--logger.")
    }
    assert silent == set()


def test_an_example_in_a_docstring_becomes_code() -> None:
    assert doctest.testmod(hook("examples")) == (0, 1)


def test_the_errors_in_troubleshooting_are_the_codes_own() -> None:
    page = _read(ROOT / "docs" / "troubleshooting.md")
    quoted = re.findall(r"^> (.+)$", page, flags=re.M)
    assert len(quoted) > 20
    messages = [text for path in (ROOT / "sae_lens_dfc").rglob("*.py") for text in _texts(path)]
    assert [one for one in quoted if not any(_says(text, one) for text in messages)] == []


def _texts(path: Path) -> list[str]:
    """The strings of a file, with … for what is put into them."""
    nodes = list(ast.walk(ast.parse(_read(path))))
    whole = [
        "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return whole + [n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str]


def _says(message: str, quoted: str) -> bool:
    """Whether a message has the pieces of a quotation, in their order."""
    pieces = (re.escape(piece.strip()) for piece in quoted.split("…") if piece.strip())
    return re.search(".*".join(pieces), message, flags=re.DOTALL) is not None


def test_the_citation_is_of_this_version_and_names_the_methods() -> None:
    citation = yaml.safe_load(_read(ROOT / "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
    # What the format asks for: https://github.com/citation-file-format
    assert {"title", "message", "authors"} <= set(citation)
    (version,) = re.findall(r"^version = \"(.+)\"$", _read(ROOT / "pyproject.toml"), flags=re.M)
    assert citation["version"] == version
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    methods = " ".join(reference["notes"] for reference in citation["references"])
    assert [name for name in ARCHITECTURES if name not in methods] == []


def test_the_issue_forms_ask_for_what_is_needed() -> None:
    forms = {
        p.stem: yaml.safe_load(_read(p))
        for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    }
    assert set(forms) == {"bug_report", "question", "config"}
    for name in ("bug_report", "question"):
        assert {"name", "description", "body"} <= set(forms[name])
        for part in forms[name]["body"]:
            assert part["type"] == "markdown" or {"id", "attributes"} <= set(part)
    asked = {part["id"] for part in forms["bug_report"]["body"]}
    assert {"command", "happened", "versions", "metrics"} <= asked


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
