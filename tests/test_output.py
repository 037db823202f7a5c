from pathlib import Path

import pytest

from sae_lens_dfc.output import all_or_nothing, check_output


def test_a_new_or_empty_folder_is_fine(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)


def test_a_folder_that_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "precious.py").write_text("x")
    with pytest.raises(ValueError, match="holds files that are not a run"):
        check_output(tmp_path / "code", overwrite=True)


def test_the_working_folder_a_file_and_a_path_below_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for path, message in (
        (".", "as a whole"),
        ("file", "is a file"),
        ("file/run", "cannot be made"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(path, overwrite=True)


def test_a_block_that_fails_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with pytest.raises(RuntimeError), all_or_nothing(tmp_path / "run") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "old"]


def test_a_block_that_ends_well_replaces_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with all_or_nothing(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "new"]
