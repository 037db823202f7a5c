"""Where the text comes from: a data set's name, a file or folder on disk, or CPython's own documentation."""

import ast
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from tqdm.auto import tqdm

CPYTHON_DOCS = "cpython-docs"
DOCUMENT_CHARS = 4_000

TABLE_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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


def load_texts(
    dataset_path: str,
    text_column: str = "text",
    split: str = "train",
    streaming: bool = True,
    dataset_name: str | None = None,
) -> Iterable[str]:
    """Documents of a data set, one string each; can be iterated again and again.

    Args:
        dataset_path: A name on the Hugging Face hub, a folder written by `save_to_disk`, a `.txt` file (cut into documents
            of 4,000 characters), a `.jsonl`, `.json`, `.csv` or `.parquet` file, or "cpython-docs", which comes with Python.
        text_column: The column that holds the text.
        split: Which split of the data set.
        streaming: Whether to read a hub data set as it downloads.
        dataset_name: Which configuration of a hub data set.

    Raises:
        ValueError: There is no such file or data set, or it has no such column.

    >>> sum(len(text) for text in load_texts("cpython-docs")) > 1_000_000
    True
    """
    if dataset_path == CPYTHON_DOCS:
        return cpython_docs()
    path = Path(dataset_path)
    if path.suffix == ".txt" and path.is_file():
        return list(split_text(path.read_text(encoding="utf-8"), DOCUMENT_CHARS))
    dataset = _open_dataset(path, dataset_path, split, streaming, dataset_name)
    columns = list(next(iter(dataset), {}))
    if not columns:
        raise ValueError(f"Data set {dataset_path!r} is empty. Give one with text in it.")
    if text_column not in columns:
        raise ValueError(
            f"Data set {dataset_path!r} has no text column {text_column!r}; its columns are {columns}. "
            "Name one of them as text_column."
        )
    return _Column(dataset, text_column)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, which may have many or none."""
    return next(iter(str(error).splitlines()), "")


def _open_dataset(
    path: Path, name: str, split: str, streaming: bool, config: str | None
) -> Dataset | IterableDataset:
    try:
        if path.suffix in TABLE_LOADERS and path.is_file():
            return load_dataset(TABLE_LOADERS[path.suffix], data_files=str(path), split=split)
        if (path / "dataset_info.json").is_file():
            return load_from_disk(str(path))  # type: ignore[return-value]
        return load_dataset(name, config, split=split, streaming=streaming)  # type: ignore[return-value]
    except Exception as error:
        raise ValueError(
            f"Could not read data set {name!r}: {type(error).__name__}: {first_line(error)} "
            "Give a hub name, a file (.txt, .jsonl, .csv, .parquet) or a folder written by save_to_disk."
        ) from error


class _Column:
    """One column of a data set, as an iterable that starts afresh each time."""

    def __init__(self, dataset: Dataset | IterableDataset, column: str):
        self._dataset = dataset
        self._column = column

    def __iter__(self) -> Iterator[str]:
        for row in self._dataset:
            text = row[self._column]  # type: ignore[index]
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


def held_out(texts: Iterable[str], every: int) -> Iterator[str]:
    """Each `every`-th document: the part that training never sees.

    >>> list(held_out("abcdefg", every=3))
    ['c', 'f']
    """
    return islice(iter(texts), every - 1, None, every)


def training_part(texts: Iterable[str], every: int) -> Iterator[str]:
    """The documents that `held_out` leaves.

    >>> list(training_part("abcdefg", every=3))
    ['a', 'b', 'd', 'e', 'g']
    """
    return (text for i, text in enumerate(texts, start=1) if i % every != 0)
