"""Where the text comes from: a data set's name, a file or folder on disk, or CPython's own documentation."""

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from datasets.features.features import require_decoding
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from tqdm.auto import tqdm
from xxhash import xxh3_64

from sae_lens_dfc.data_files import TABLE_LOADERS, check_saved, check_table, files_in, pattern_of

CPYTHON_DOCS = "cpython-docs"
DOCUMENT_CHARS = 4_000

_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "pydoc_data",
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


Place = dict[str, Any]
"""Where a reading stands, in values that JSON can hold; a reading that starts there goes on as if it had never stopped."""


def load_texts(
    dataset_path: str,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = True,
    dataset_name: str | None = None,
) -> Iterable[str]:
    """Documents of a data set, one string each; can be iterated again and again.

    Args:
        dataset_path: As in `open_rows`.
        text_column: The column that holds the text.
        split: Which split of the data set.
        streaming: Whether to read a hub data set as it downloads.
        dataset_name: Which configuration of a hub data set.

    Raises:
        ValueError: There is no such file or data set, or it has no such column.

    >>> sum(len(text) for text in load_texts("cpython-docs")) > 1_000_000
    True
    """
    rows = open_rows(dataset_path, text_column, split, streaming, dataset_name)
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
        dataset_path: A name on the Hugging Face hub, a folder written by `save_to_disk` or of such files as follow, a `.txt`
            file (cut into documents of 4,000 characters), a `.jsonl`, `.json`, `.csv` or `.parquet` file, or "cpython-docs", which comes with Python.
        text_column: Name of the only column of a source that is plain text.
        split: Which split of the data set.
        streaming: Whether to read a hub data set as it downloads.
        dataset_name: Which configuration of a hub data set.

    Raises:
        ValueError: There is no such file or data set, or it is empty.
    """
    path = Path(dataset_path)
    is_empty = path.is_file() and path.stat().st_size == 0
    if dataset_path == CPYTHON_DOCS:
        dataset = _from_texts(cpython_docs(), text_column)
    elif path.suffix == ".txt" and path.is_file():
        dataset = _from_texts(split_text(read_text(path), DOCUMENT_CHARS), text_column)
    elif not is_empty:
        dataset = _open_dataset(path, dataset_path, split, streaming, dataset_name)
    else:
        dataset = Dataset.from_dict({})
    rows = Rows(dataset, dataset_path)
    if not rows.columns:
        raise ValueError(f"Data set {dataset_path!r} is empty. Give one with text in it.")
    return rows


def read_text(path: Path) -> str:
    """All of a file's text.

    Raises:
        ValueError: It is not UTF-8.
    """
    with _utf8_only(str(path)):
        return path.read_text(encoding="utf-8")


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Whatever datasets raises as one error that names the data set."""
    try:
        with _utf8_only(name):
            yield
    except (_NotReadable, MemoryError):
        raise
    except Exception as error:
        # Errors of datasets say that there was one, and have the one that there was as their cause.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise _NotReadable(
            f"Could not read data set {name!r}: {type(cause).__name__}: {first_line(cause)} "
            "Give a hub name, a file (.txt, .jsonl, .csv, .parquet) or a folder written by save_to_disk."
        ) from error


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
    """Rows of a data set, to be read from any place on, as often as one likes, also at the same time.

    >>> rows = Rows(Dataset.from_dict({"text": ["a", "b", "c"]}), "mine")
    >>> (_, place), *_ = rows.read()
    >>> [row["text"] for row, _ in rows.read(place)]
    ['b', 'c']
    """

    def __init__(self, dataset: Dataset | IterableDataset, name: str):
        self.dataset = _without_media(dataset)
        self.name = name
        """What to call the data set in messages."""

    @cached_property
    def _first(self) -> dict[str, Any]:
        # Of a hub data set, a download.
        with _one_error(self.name):
            return next(iter(self.dataset), {})  # type: ignore[return-value]

    @property
    def columns(self) -> list[str]:
        """Names of the columns; none when there is no row."""
        return list(self._first)

    @cached_property
    def fingerprint(self) -> str:
        """A sign of the rows: another first row or another number of them gives another. It is no checksum."""
        n = len(self.dataset) if isinstance(self.dataset, Dataset) else None
        return xxh3_64(repr((n, self._first)).encode("utf-8", "surrogatepass")).hexdigest()

    def share(self, rank: int, world_size: int) -> "Rows":
        """The part of the rows that one of several processes reads."""
        if world_size == 1:
            return self
        part = split_dataset_by_node(self.dataset, rank, world_size)  # type: ignore[type-var]
        return Rows(part, self.name)

    def read(self, place: Place | None = None) -> Iterator[tuple[dict[str, Any], Place]]:
        """Each row with the place after it.

        Raises:
            ValueError: There is no such place, or a row cannot be read.
        """
        with _one_error(self.name):
            yield from self._read(place)

    def _read(self, place: Place | None) -> Iterator[tuple[dict[str, Any], Place]]:
        if isinstance(self.dataset, Dataset):
            start = 0 if place is None else place.get("row")
            if not isinstance(start, int) or start < 0:
                raise _NotReadable(f"{place!r:.80} is no place in data set {self.name!r}.")
            if start < len(self.dataset):
                rest = self.dataset.select(range(start, len(self.dataset)))
                for i, row in enumerate(rest, start=start + 1):
                    yield row, {"row": i}  # type: ignore[misc]
            return
        # A streamed data set holds one place at a time; each reading has its own.
        dataset = deepcopy(self.dataset)
        if place is not None:
            try:
                dataset.load_state_dict(place)
            except Exception as error:
                raise _NotReadable(
                    f"{place!r:.80} is no place in data set {self.name!r}: {first_line(error)}"
                ) from error
        for row in dataset:
            yield row, dataset.state_dict()


def _from_texts(texts: Iterable[str], column: str) -> Dataset:
    return Dataset.from_dict({column: [clean(text) for text in texts]})


def first_line(error: BaseException) -> str:
    """The first line of another library's message, which may have many or none."""
    return next(iter(str(error).splitlines()), "")


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
            # As other libraries would have them, rows are not what is read here.
            return load_from_disk(str(path)).with_format(None)  # type: ignore[return-value]
        if name in _PACKAGED_DATASETS_MODULES:
            raise ValueError(
                "it is the name of a format, which would read whatever lies in the current folder."
            )
        if path.is_dir():
            loader, files, options = files_in(path, config)
            how: dict[str, Any] = {"split": split, "streaming": streaming, **options}
            return load_dataset(loader, data_files=files, **how)  # type: ignore[return-value]
        return load_dataset(name, config, split=split, streaming=streaming)  # type: ignore[return-value]


def _without_media(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The columns that can be text: to read a row with a picture or sound is to open, or download, what its path names."""
    features = dataset.features
    if features is None or not any(require_decoding(one) for one in features.values()):
        return dataset
    return dataset.select_columns(
        [name for name, one in features.items() if not require_decoding(one)]
    )


class _Column:
    """One column of a data set, as an iterable that starts afresh each time."""

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


@lru_cache(maxsize=1)
def cpython_docs() -> list[str]:
    """English prose that comes with Python: its reference pages and the docstrings of its library, about 2 MB.

    Documents are in a fixed random order, so that any stretch of them is a fair sample. A paragraph
    that stands in several of them is kept once: 17 % of the reference pages repeats, and would be
    trained on and held out at the same time.
    """
    documents = [*reference_pages(), *library_docstrings()]
    random.Random(0).shuffle(documents)
    return list(without_repeats(documents))


def reference_pages() -> list[str]:
    """The pages that `help()` shows for Python's keywords and topics."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def library_docstrings() -> Iterator[str]:
    """The docstrings of each module of the standard library, joined."""
    root = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in tqdm(sorted(root.rglob("*.py")), "Reading Python's docstrings", leave=False):
        if _NOT_LIBRARY & set(path.relative_to(root).parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):
            continue  # files for tests of the parser are broken on purpose
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(d for d in docstrings if d):
            yield text


def without_repeats(documents: Iterable[str], min_chars: int = 80) -> Iterator[str]:
    """The documents without paragraphs of `min_chars` characters or more that an earlier one has.

    >>> list(without_repeats(["one\\n\\ntwo", "two\\n\\nthree"], min_chars=3))
    ['one\\n\\ntwo', 'three']
    """
    seen: set[str] = set()
    for document in documents:
        fresh: list[str] = []
        for paragraph in document.split("\n\n"):
            if len(paragraph) < min_chars or paragraph not in seen:
                fresh.append(paragraph)
                seen.add(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def clean(text: str) -> str:
    """The same text, character for character, in a form that every tokenizer accepts.

    >>> clean("a\\ud800b")
    'a\\ufffdb'
    """
    return _LONE_SURROGATE.sub("\ufffd", text)


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a long document, at the last line end or else space of each stretch, so that tokenizing stays linear.

    A SentencePiece tokenizer without a pre-tokenizer takes quadratic time on one long string.

    >>> list(split_text("one two\\nthree four", max_chars=10))
    ['one two', '\\nthree', ' four']
    """
    start = 0
    while start < len(text):
        end = min(len(text), start + max_chars)
        if end < len(text):
            cut = max(text.rfind("\n", start + 1, end), start)
            cut = cut if cut > start else max(text.rfind(" ", start + 1, end), start)
            end = cut if cut > start else end
        yield text[start:end]
        start = end
