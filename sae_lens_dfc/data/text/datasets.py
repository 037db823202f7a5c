"""Opens a data set by hub name, file or folder, and reads its rows from any position."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from huggingface_hub import HfFileSystem

from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.core.untrusted.dataset_folder import (
    TABLE_LOADERS,
    OtherVersion,
    check_saved,
    check_table,
    files_in,
    of_datasets,
    pattern_of,
)
from sae_lens_dfc.data.config import CPYTHON_DOCS
from sae_lens_dfc.data.text.cleaning import clean, split_text
from sae_lens_dfc.data.text.columns import as_stored, row_of
from sae_lens_dfc.data.text.cpython_docs import cpython_docs

logger = logging.getLogger(__name__)

DOCUMENT_CHARS = 4_000


RowsState = dict[str, Any]
"""Resumable position in a data set, as values that JSON can hold: a reader started from it yields
exactly what would have come next."""


def load_texts(dataset_path: str, text_column: str = "text") -> Iterable[str]:
    """Documents of a data set, one string each; can be iterated several times.

    Args:
        dataset_path: As in `open_rows`.
        text_column: The column that holds the text.

    Raises:
        ValueError: The file or data set does not exist, or has no such column.

    >>> sum(len(text) for text in load_texts("cpython-docs")) > 1_000_000
    True
    """
    rows = open_rows(dataset_path, text_column)
    if text_column not in rows.columns:
        raise ValueError(
            f"Data set {dataset_path!r} has no text column {text_column!r}; its columns are {rows.columns}. "
            "Name one of them as text_column."
        )
    return _Column(rows, text_column)


def open_rows(
    dataset_path: str,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = True,
    dataset_name: str | None = None,
) -> "Rows":
    """The rows of a data set.

    Args:
        dataset_path: A Hugging Face hub name; a `.txt` file (split into documents of 4,000
            characters), `.jsonl`, `.json`, `.csv` or `.parquet` file; a folder of such files or one
            written by `save_to_disk`; or "cpython-docs", which ships with Python.
        text_column: Name for the single column of a plain-text source.
        split: Which split of the data set.
        streaming: Whether to read a hub data set as it downloads.
        dataset_name: Which configuration of a hub data set.

    Raises:
        ValueError: The file or data set does not exist or is empty.
    """
    if not dataset_path:
        raise ValueError(
            "A data set has no name. Set dataset_path to a hub name, a file, a folder or cpython-docs."
        )
    path = Path(dataset_path)
    is_empty = path.is_file() and path.stat().st_size == 0
    if dataset_path == CPYTHON_DOCS:
        dataset = _from_texts(cpython_docs(), text_column)
    elif path.suffix == ".txt" and path.is_file():
        dataset = _from_texts(split_text(read_text_file(path), DOCUMENT_CHARS), text_column)
    elif not is_empty:
        dataset = _open_dataset(path, dataset_path, split, streaming, dataset_name)
    else:
        dataset = Dataset.from_dict({})
    rows = Rows(dataset, dataset_path)
    if not rows.columns:
        raise ValueError(f"Data set {dataset_path!r} is empty. Give one with text in it.")
    return rows


def read_text_file(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: It is not UTF-8.
    """
    with _utf8_only(str(path)):
        return path.read_text(encoding="utf-8")


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Re-raise any error that datasets raises about the data as one that names the data set."""
    try:
        with _utf8_only(name):
            yield
    except (_NotReadable, OtherVersion, MemoryError):
        raise
    except Exception as error:
        # The errors of datasets only wrap the actual error, which is their cause.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        if _is_fault(cause):
            raise
        raise _NotReadable(
            f"Could not read data set {name!r}: {type(cause).__name__}: {said_by(cause)} "
            "Give a hub name, a file (.txt, .jsonl, .csv, .parquet) or a folder written by save_to_disk."
        ) from error


def _is_fault(error: BaseException) -> bool:
    """Whether an error is a bug, in this package or a library, that other data would not fix.

    The errors that damaged files cause cannot be listed: 540 of them raised OSError, the errors of
    Arrow, pandas, JSON and UTF-8, and also KeyError, AttributeError and, from Arrow, SystemError.
    None raised a plain RuntimeError, which Python raises for shared state ("dictionary changed size
    during iteration") and threads. The RuntimeErrors that the data cause are too deep nesting, an
    operation that a format does not support, a table that ends before its first part, and a data
    set that is a script.
    """
    is_script = "Dataset scripts are no longer supported" in str(error)
    if isinstance(error, RecursionError | NotImplementedError) or is_script:
        return False
    is_end = isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration)
    return isinstance(error, RuntimeError | AssertionError | NameError) and not is_end


class _NotReadable(ValueError):
    """An error that names the data set."""


@contextmanager
def _utf8_only(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _NotReadable(
            f"{name!r} is not text in UTF-8: {error.reason} at byte {error.start}. Convert it to UTF-8, or name a file of text."
        ) from error


class Rows:
    """Rows of a data set that can be read from any position, repeatedly, and by several threads at
    once.

    >>> rows = Rows(Dataset.from_dict({"text": ["a", "b", "c"]}), "mine")
    >>> (_, place), *_ = rows.read()
    >>> [row["text"] for row, _ in rows.read(place)]
    ['b', 'c']

    Raises:
        ValueError: All its columns hold only images, audio or other files.
    """

    def __init__(self, dataset: Dataset | IterableDataset, name: str, whole: "Rows | None" = None):
        self.name = name
        """Name of the data set in messages."""
        self.whole = whole or self
        """The rows of all ranks; the same object if these are not a share."""
        self._lock = Lock()
        own = _copied(dataset) if isinstance(dataset, IterableDataset) else dataset
        with _one_error(name):
            self.dataset: Dataset | IterableDataset = as_stored(own)
        """The opened data set. A streamed one is copied for each reader and never read itself."""

    @cached_property
    def first(self) -> dict[str, Any]:
        """The first row; empty if there is none."""
        # Cached, because it starts a download for a hub data set.
        return next((row for row, _ in self.read()), {})

    @property
    def columns(self) -> list[str]:
        """Names of the columns; empty if there is no row."""
        return list(self.first)

    def share(self, rank: int, world_size: int) -> "Rows":
        """The share of the rows of one of several ranks."""
        if world_size == 1:
            return self
        part = split_dataset_by_node(self._own(), rank, world_size)  # type: ignore[type-var]
        return Rows(part, self.name, self.whole)

    def read(self, place: RowsState | None = None) -> Iterator[tuple[dict[str, Any], RowsState]]:
        """Each row with the position after it.

        Raises:
            ValueError: The position does not exist, or a row cannot be read.
        """
        # Outside the block: errors in copying are not the data's.
        own = self._own()
        with _one_error(self.name):
            read = self._numbered if isinstance(own, Dataset) else self._streamed
            yield from read(own, place)  # type: ignore[arg-type]

    def _own(self) -> Dataset | IterableDataset:
        """The data set for one reader: a copy if it is streamed, because a streamed data set stores
        its reader's position."""
        if isinstance(self.dataset, Dataset):
            return self.dataset
        with self._lock:  # copying modifies datasets' lists of files
            return _copied(self.dataset)

    def _numbered(
        self, dataset: Dataset, place: RowsState | None
    ) -> Iterator[tuple[dict[str, Any], RowsState]]:
        start = 0 if place is None else place.get("row") if isinstance(place, dict) else None
        if not isinstance(start, int) or start < 0:
            self._refuse(place)
        if start < len(dataset):
            rest = dataset.select(range(start, len(dataset)))
            for i, table in enumerate(rest, start=start + 1):
                yield row_of(table), {"row": i}

    def _streamed(
        self, dataset: IterableDataset, place: RowsState | None
    ) -> Iterator[tuple[dict[str, Any], RowsState]]:
        if place is not None:
            if not isinstance(place, dict) or place.keys() != dataset.state_dict().keys():
                self._refuse(place)
            dataset.load_state_dict(place)
        for table in dataset:
            yield row_of(table), dataset.state_dict()

    def _refuse(self, place: Any) -> NoReturn:
        raise _NotReadable(f"{place!r:.80} is not a position in data set {self.name!r}.")


def _copied(dataset: IterableDataset) -> IterableDataset:
    """A deep copy that shares only this process's open hub file systems.

    Each streamed data set holds all of these, to pass them to other processes. Copying them in a
    thread would open new ones for that thread, so their dictionary would grow while it is copied.
    """
    open_ones = HfFileSystem._cache  # type: ignore[attr-defined]
    return deepcopy(dataset, {id(open_ones): open_ones})


def _from_texts(texts: Iterable[str], column: str) -> Dataset:
    return Dataset.from_dict({column: [clean(text) for text in texts]})


def _open_dataset(
    path: Path, name: str, split: str, streaming: bool, config: str | None
) -> Dataset | IterableDataset:
    with _one_error(name):
        if path.suffix in TABLE_LOADERS and path.is_file():
            check_table(path)
            loader = TABLE_LOADERS[path.suffix]
            return load_dataset(loader, data_files=pattern_of(path), split=split)  # type: ignore[return-value]
        if (path / "dataset_info.json").is_file():
            check_saved(path)
            return load_from_disk(str(path))  # type: ignore[return-value]
        if name in of_datasets("packaged_modules", "_PACKAGED_DATASETS_MODULES"):
            raise ValueError(
                "it is the name of a format, with which datasets would read the files in the current folder."
            )
        if path.is_dir():
            loader, files, options, note = files_in(path, config)
            if note:
                logger.warning("%s", note)
            how: dict[str, Any] = {"split": split, "streaming": streaming, **options}
            return load_dataset(loader, data_files=files, **how)  # type: ignore[return-value]
        _check_not_a_file(path)
        return load_dataset(name, config, split=split, streaming=streaming)  # type: ignore[return-value]


def _check_not_a_file(path: Path) -> None:
    """Refuse the name of a local file before it is looked up on the hub, which is slow and
    discloses the name."""
    ends = (".txt", *TABLE_LOADERS)
    if path.is_file() and path.suffix != ".py":  # datasets has its own error for scripts
        raise ValueError(f"files that end in {path.suffix!r} are not read; unpack or convert it.")
    if path.suffix in ends and not path.exists():
        raise ValueError("there is no such file.")


class _Column:
    """One column of a data set, as an iterable that restarts each time."""

    def __init__(self, rows: Rows, column: str):
        self._rows = rows
        self._column = column

    def __iter__(self) -> Iterator[str]:
        for row, _ in self._rows.read():
            text = row[self._column]
            if not isinstance(text, str | None):
                raise ValueError(
                    f"Column {self._column!r} holds {type(text).__name__}, not text. Name a column of strings."
                )
            yield text or ""
