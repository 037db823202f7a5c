import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_dfc.core.atomic_write import atomic_file, atomic_folder
from sae_lens_dfc.core.output_folder import check_output


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
        ("file", "is no folder"),
        (os.devnull, "is no folder"),
        ("file/run", "cannot be made"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(path, overwrite=True)


def test_a_block_that_fails_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "old"]


def test_a_block_that_ends_well_replaces_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "new"]


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ValueError, match="not a file"),
        atomic_file(tmp_path / "pipe") as temporary,
    ):
        temporary.write_text("x")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_an_interrupt_while_folders_are_swapped_leaves_the_old_one_or_the_new(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    renames, rename = iter(range(1, 9)), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if next(renames) == n:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    left = "old" if n == 1 else "new"
    assert [path.name for path in tmp_path.rglob("*")] == ["run", left]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_of_a_folder_has_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "inside").mkdir()
            (folder / "cfg.json").touch()
            save_file({"x": torch.zeros(2)}, folder / "inside" / "weights.safetensors")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o666 & ~umask] * 2
