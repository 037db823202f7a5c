import subprocess
from pathlib import Path

import pytest

from tests import touched as module
from tests.touched import READ_BY, ROOT, changed_files, main, touched


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        "sae_lens_dfc/one.py": "",
        "sae_lens_dfc/two.py": "",
        "tests/helpers.py": "from sae_lens_dfc.two import f",
        "tests/test_one.py": "from sae_lens_dfc import one",
        "tests/deep/test_helped.py": "def test() -> None:\n    from tests.helpers import f",
        "tests/test_other.py": "import sae_lens_dfc.three",
        "tests/test_docs.py": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ("sae_lens_dfc/one.py", ["tests/test_one.py"]),
        ("sae_lens_dfc/two.py", ["tests/deep/test_helped.py"]),
        ("tests/helpers.py", ["tests/deep/test_helped.py"]),
        ("docs/how-to/demo.md", ["tests/test_docs.py"]),
        ("pyproject.toml", []),
        ("tests/gone.py", []),
    ],
)
def test_a_change_touches_the_tests_that_import_it(
    changed: str, chosen: list[str], checkout: Path
) -> None:
    assert touched({changed}, checkout) == chosen


def test_tests_that_changed_themselves_come_first(checkout: Path) -> None:
    changed = {"tests/test_other.py", "sae_lens_dfc/one.py"}
    assert touched(changed, checkout) == ["tests/test_other.py", "tests/test_one.py"]


def test_what_changed_is_what_was_committed_since_and_what_was_not_yet(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str, day: int = 1) -> None:
        date = f"2026-01-0{day}T12:00:00Z"
        env = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "PATH": "/usr/bin:/bin"}
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *args], cwd=checkout, env=env, check=True, capture_output=True)

    monkeypatch.setattr(module, "ROOT", checkout)
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (checkout / "sae_lens_dfc/one.py").write_text("1")
    git("commit", "-am", "second", day=4)
    (checkout / "new.py").write_text("1")
    assert changed_files(None) == {"sae_lens_dfc/one.py", "new.py"}
    assert changed_files("HEAD") == {"new.py"}


def test_without_a_history_nothing_is_chosen_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    main([])
    printed = capsys.readouterr()
    assert printed.out == "" and "No slow test is chosen" in printed.err


def test_the_tests_that_read_a_folder_exist() -> None:
    assert [test for test in READ_BY.values() if not (ROOT / f"tests/{test}.py").exists()] == []
