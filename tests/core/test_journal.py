from pathlib import Path
from typing import Any

import pytest

from sae_lens_dfc.core.journal import Journal


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    path, made = tmp_path / "deep" / "p.jsonl", list[str]()

    def make() -> Any:
        made.append("x")
        return {"value": [1, None, "é\u2028"]}

    first = Journal(path, {"seed": 0})
    assert first.done("one", make) == first.done("one", make) == {"value": [1, None, "é\u2028"]}
    again = Journal(path, {"seed": 0})
    assert again.done("one", make) == {"value": [1, None, "é\u2028"]} and made == ["x"]
    again.done("two", make)
    again.forget()
    assert not path.exists() and Journal(path, {"seed": 1}).results == {}


def test_a_line_cut_short_by_a_crash_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    progress = Journal(path, {})
    progress.done("one", lambda: 1)
    whole = path.read_text()
    for n in range(1, len(whole) + 1):
        path.write_text(whole[:n])
        again = Journal(path, {})
        assert again.done("one", lambda: 1) == 1 and again.done("two", lambda: 2) == 2
        assert Journal(path, {}).results == {"one": 1, "two": 2}


@pytest.mark.parametrize("text", ['{"settings": {"seed": 1}}\n', "[1]\n", "hello\n", '{"a": 1}\n'])
def test_other_results_stay_and_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="another --output"):
        Journal(path, {"seed": 0})
    assert path.read_text() == text
