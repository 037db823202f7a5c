"""Checks that the files of a model's folder exist and are complete, before a library reads them."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.terminal import said_by

POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, which git keeps in place of a large file."""
WEIGHT_FILES = tuple(
    f"{n}{end}" for n in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Weight files that transformers looks for, in its order; it reads only the first that exists."""
ZIP = b"PK"
"""First bytes of a torch.save file, since torch 1.6."""


def check_weights(folder: Path) -> None:
    """Refuse a folder in which a weight file that the index lists is missing or damaged.

    Files that transformers would not read are ignored, such as an LFS pointer to weights in an
    older format.

    Raises:
        ValueError: A file is missing or damaged; the message names it and says what to do.
    """
    read = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if read is None:
        return
    check_model_file(read)
    if read.suffix != ".json":
        return
    named = read_object(read).get("weight_map")
    files = {str(file) for file in named.values()} if isinstance(named, Mapping) else set()
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        raise ValueError(
            f"{len(missing)} of its {len(files)} files of weights are not in the folder: {missing[0]!r:.200}, which {read.name} "
            "names. Copy the missing files into it."
        )
    for file in sorted(files):
        check_model_file(folder / file)


def check_model_file(path: Path) -> None:
    """Refuse a model file that is empty, truncated, or a Git LFS pointer.

    Raises:
        ValueError: The file is one of these; the message names it and says what to do.
    """
    check_pointer(path)
    with path.open("rb") as file:
        begin = file.read(len(ZIP))
    if not begin:
        raise ValueError(f"{path.name} is empty. Copy the file again.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path.name} is damaged or cut short ({said_by(error).rstrip('.')}). Copy the file again."
            ) from None
    elif begin == ZIP and not is_zipfile(path):
        raise ValueError(f"{path.name} is cut short. Copy the file again.")


def check_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which takes the place of a file that was not fetched.

    Raises:
        ValueError: The file is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path.name} is a pointer of git LFS, not the file itself: run `git lfs pull` in its repository."
            )
