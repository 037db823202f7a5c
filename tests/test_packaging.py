"""What a release needs, holds and says of itself."""

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files, requires
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import sae_lens_dfc

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sae_lens_dfc.__file__).parent
NOT_DECLARED = {"dictionary_learning": "a peer that is measured where it is installed"}
"""Packages that are imported if they are there, and why no extra names them."""
MOST_BYTES = 1_000_000


def imported(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """Top-level names of what a file imports, at its beginning or everywhere in it."""
    for node in ast.walk(tree) if everywhere else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def provided(everywhere: bool) -> Iterator[str]:
    """Top-level names of the distributions that pyproject.toml requires, in an extra if anywhere
    may be."""
    needed = [r for r in requires("sae-lens-dfc") or [] if everywhere or "extra ==" not in r]
    for name in {re.split(r"[^\w.-]", one)[0] for one in needed}:
        # An extra that is not installed provides nothing.
        with suppress(PackageNotFoundError):
            yield from (path.parts[0].removesuffix(".py") for path in files(name) or [])


def undeclared(folder: Path, everywhere: bool, with_extras: bool) -> set[str]:
    """Names that a folder imports from somewhere that pyproject.toml does not require."""
    trees = (ast.parse(path.read_text("utf-8")) for path in sorted(folder.rglob("*.py")))
    names = {name for tree in trees for name in imported(tree, everywhere)}
    ours = {"sae_lens_dfc", folder.name}
    return names - {*ours, *sys.stdlib_module_names, *NOT_DECLARED, *provided(with_extras)}


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "anywhere"])
def test_every_package_that_is_imported_is_declared(everywhere: bool) -> None:
    assert undeclared(PACKAGE, everywhere, with_extras=everywhere) == set()
    assert undeclared(ROOT / "benchmarks", everywhere, with_extras=True) == set()


@pytest.mark.slow
def test_every_package_that_is_declared_is_imported() -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    names = {name for tree in trees for name in imported(tree, everywhere=True)}
    needed = {
        re.split(r"[^\w.-]", r)[0] for r in requires("sae-lens-dfc") or [] if "extra ==" not in r
    }
    provides = {
        one: {path.parts[0].removesuffix(".py") for path in files(one) or []} for one in needed
    }
    assert {one for one, own in provides.items() if not own & names} == set()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_is_the_package_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"sae_lens_dfc"}
    assert "sae_lens_dfc/organisms/options.py" in names


def test_the_source_of_a_release_is_the_package_and_what_explains_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {path.parts[0] for path in inside} == {
        *(".gitignore", "PKG-INFO", "pyproject.toml", "constraints.txt", "sae_lens_dfc"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
    }
    ours = {path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file()}
    kept = {path for path in ours if "__pycache__" not in path.parts}
    assert {path for path in inside if path.parts[0] == "sae_lens_dfc"} == kept
    assert sdist.stat().st_size < MOST_BYTES


def test_a_release_names_its_authors_license_and_pythons(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("PKG-INFO"))
        file = archive.extractfile(name)
        assert file is not None
        about = file.read().decode()
    (author,) = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["authors"]
    assert f"\nAuthor: {author['name']}\n" in about
    # An expression; with it, classifiers of licenses are not allowed (PEP 639).
    assert "\nLicense-Expression: MIT\n" in about and "License ::" not in about
    for minor in (10, 11, 12, 13):
        assert f"\nClassifier: Programming Language :: Python :: 3.{minor}\n" in about


@pytest.fixture(scope="module")
def for_pypi() -> ModuleType:
    spec = importlib.util.spec_from_file_location("for_pypi", ROOT / ".github" / "for_pypi.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_pypi_every_link_of_the_readme_leads_to_the_tags_file(for_pypi: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    text = for_pypi.absolute_links(readme, "me/mine", "v1")
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
    made = re.findall(r"/me/mine/(?:blob/)?v1/([^)#\s]+)", text)
    assert len(made) == len(re.findall(r"\]\((?!https://)[^)]*\)", readme))
    assert all((ROOT / path).exists() for path in made)
    assert "(https://raw.githubusercontent.com/me/mine/v1/docs/assets/report.png)" in text


def test_on_pypi_the_repository_is_named(for_pypi: ModuleType) -> None:
    before = (ROOT / "pyproject.toml").read_text("utf-8")
    after = for_pypi.with_urls(before, "me/mine", "v1")
    table = after.split("[project.urls]\n")[1].split("\n[")[0]
    assert 'Homepage = "https://github.com/me/mine"\n' in table
    assert 'Documentation = "https://me.github.io/mine/"\n' in table
    with pytest.raises(ValueError, match=r"has no \[project.urls\]"):
        for_pypi.with_urls("[project]\n", "me/mine", "v1")
