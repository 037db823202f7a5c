"""Reads documents from data sets of text, chats, token ids or contrastive answers, and aligns
them."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by
from sae_lens_dfc.core.untrusted.dataset_folder import files_in
from sae_lens_dfc.data.alignment.align import Coverage
from sae_lens_dfc.data.alignment.chat import contrastive_documents
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cleaning import split_text
from sae_lens_dfc.data.text.datasets import Rows, RowsState, open_rows
from sae_lens_dfc.data.text.fingerprints import (
    fingerprint_of_files,
    fingerprint_of_rows,
    fingerprint_of_value,
)

logger = logging.getLogger(__name__)

# Long enough for any sentence-level effect, short enough for tokenizers that take quadratic time.
MAX_CHARS = 20_000
MAX_NAME = 80
CHAT_COLUMN = "messages"
FILE_ENDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
TOKEN_COLUMNS = ("input_ids", "tokens")
OTHER_CHAT_COLUMNS = ("conversations", "conversation")
"""The names of ShareGPT and LMSYS-Chat-1M."""
CONTRASTIVE_COLUMNS = {"prompt", "completion_a", "completion_b"}


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name for each source, all different: its file's stem or folder's name, then its
    configuration if it has one, then a number if sources share a name.

    >>> source_names([SourceConfig("text/en.jsonl"), SourceConfig("me/wiki", dataset_name="pt"), SourceConfig("en.txt")])
    ['en', 'wiki-pt', 'en-2']
    """
    names: list[str] = []
    for cfg in sources:
        path = Path(cfg.dataset_path)
        stem = path.stem if path.suffix in FILE_ENDS else path.name
        name = short_name("-".join(filter(None, [stem, cfg.dataset_name]))) or "text"
        n = 1
        while (numbered := name if n == 1 else f"{name}-{n}") in names:
            n += 1
        names.append(numbered)
    return names


def short_name(text: str) -> str:
    """A name of at most 80 letters, digits, dots, dashes and underscores, as metrics' names have
    them; empty if there are none.

    >>> short_name("Português (BR)")
    'Português-BR'
    """
    return re.sub(r"[^\w.-]+", "-", text)[:MAX_NAME].strip("-")


class AlignedDocument(NamedTuple):
    """A document of a source, which is tokenized and aligned only as its pieces are read."""

    pieces: Iterator[tuple[Segments, Coverage]]
    is_empty: bool
    """Whether it is null, or without any character, message or token id."""
    after: RowsState
    """Position after it."""
    group: str
    """Name of its group; see `Source`."""


class Source:
    """A data set whose documents can be read from any position on.

    Args:
        cfg: The column to read, and its weight.
        rows: Its rows.
        name: Group of all its documents.
        by: Column whose values are the documents' groups, instead of the name.

    Raises:
        ValueError: It has no column that can be read, or none called `by`.

    >>> from datasets import Dataset
    >>> source = Source(SourceConfig("mine"), Rows(Dataset.from_dict({"text": ["a", "b"]}), "mine"))
    >>> [document for document, _ in source.read()]
    ['a', 'b']
    """

    def __init__(self, cfg: SourceConfig, rows: Rows, name: str = "", by: str | None = None):
        if by is not None and by not in rows.columns:
            raise ValueError(
                f"Data set {cfg.dataset_path!r} has no column {by!r} to group its documents by; its columns are {list(rows.columns)}. Name one of them."
            )
        self.cfg = cfg
        self.rows = rows
        self.name = name
        self.by = by
        self.column = _column(cfg, rows.columns)
        """The column that is read; None for contrastive rows, whose three columns are all read."""
        self._has_warned = False

    @classmethod
    def open(cls, cfg: SourceConfig, name: str = "", by: str | None = None) -> "Source":
        """Open the data set that `cfg` names.

        Raises:
            ValueError: The data set does not exist, or has no column that can be read, or none
                called `by`.
        """
        rows = open_rows(
            cfg.dataset_path,
            cfg.text_column or "text",
            cfg.dataset_split,
            cfg.streaming,
            cfg.dataset_name,
        )
        return cls(cfg, rows, name, by)

    def share(self, rank: int, world_size: int) -> "Source":
        """The share of one of several ranks."""
        if world_size == 1:
            return self
        return Source(self.cfg, self.rows.share(rank, world_size), self.name, self.by)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the content that is read, independent of its location. A stream from the
        hub may be endless, so its fingerprint is its hub name and its first row."""
        cfg, rows = self.cfg, self.rows.whole
        if isinstance(rows.dataset, Dataset):
            columns = sorted(CONTRASTIVE_COLUMNS) if self.column is None else [self.column]
            return fingerprint_of_rows(rows.dataset, columns)
        folder = Path(cfg.dataset_path)
        if folder.is_dir():
            patterns = files_in(folder, cfg.dataset_name).files[cfg.dataset_split]
            files = [Path(path) for pattern in patterns for path in glob(pattern)]
            return {"column": self.column, **fingerprint_of_files(files)}
        first = rows.first if self.column is None else rows.first[self.column]
        return {
            "hub": cfg.dataset_path,
            "name": cfg.dataset_name,
            "split": cfg.dataset_split,
            "column": self.column,
            "first_row": fingerprint_of_value(first),
        }

    @property
    def note(self) -> str:
        """A sentence on the files of a folder that are not read; empty if there are none, or if the
        data set is not a folder of files."""
        folder = Path(self.cfg.dataset_path)
        if not folder.is_dir() or (folder / "dataset_info.json").is_file():
            return ""
        return files_in(folder, self.cfg.dataset_name).note

    @property
    def is_chat(self) -> bool:
        """Whether its documents are chats, judged by the first one."""
        if self.column is None:
            return True
        document = self.rows.whole.first[self.column]
        return isinstance(document, list) and any(isinstance(part, Mapping) for part in document)

    def check_unreadable(
        self, n_unreadable: int, n_documents: int, number: int, error: ValueError
    ) -> None:
        """Raise if too many documents are unreadable, or if the very first one is, since then all
        may be. Otherwise log the first unreadable document.

        Args:
            n_unreadable: Number of unreadable documents so far.
            n_documents: Number of documents read so far.
            number: Index of the last unreadable document in the data set, from 0.
            error: Why that document could not be read.

        Raises:
            ValueError: Too many documents are unreadable; the message names the source, the last
                document and its error.
        """
        allowed = self.cfg.max_unreadable
        is_first = n_documents == 1 and allowed < 1
        if not is_first and n_unreadable <= max(1, allowed * n_documents):
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "Document %d of %s cannot be read and is skipped; others are skipped too, up to a share of max_unreadable=%g: %s",
                    *(number, self.cfg.dataset_path, allowed, error),
                )
            return
        raise ValueError(
            f"{n_unreadable} of the {n_documents} documents of {self.cfg.dataset_path!r} read so far cannot be read, "
            f"more than max_unreadable={allowed:g} allows. The last, number {number}: {said_by(error, MOST_OF_OURS)}"
        ) from error

    def check_empty(self, n_empty: int, n_documents: int) -> None:
        """Refuse a data set that was read to its end and whose documents are all empty.

        Args:
            n_empty: Number of empty documents.
            n_documents: Number of documents read.

        Raises:
            ValueError: All documents are empty.
        """
        is_share = self.rows.whole is not self.rows
        if n_documents == 0 or n_empty < n_documents or is_share:
            return
        raise ValueError(
            f"All {n_documents} documents of {self.cfg.dataset_path!r} that were read are empty in column {self.column!r}. "
            f"Its columns are {self.rows.columns}: name another as text_column, or give other text."
        )

    def read(self, place: RowsState | None = None) -> Iterator[tuple[Any, RowsState]]:
        """Each document (a value of the column, or a whole contrastive row) with the position after
        it."""
        for row, after in self.rows.read(place):
            yield self._document(row), after

    def _document(self, row: dict[str, Any]) -> Any:
        return row if self.column is None else row[self.column]

    def read_aligned(
        self, pair: ModelPair, place: RowsState | None = None
    ) -> Iterator[AlignedDocument]:
        """Each document from a position on, aligned between the pair's tokenizers."""
        for row, after in self.rows.read(place):
            document = self._document(row)
            pieces = aligned_pieces(pair, document, self.cfg.tokenizer)
            group = self.name if self.by is None else short_name(str(row[self.by])) or "empty"
            yield AlignedDocument(pieces, is_empty(document), after, group)


def _column(cfg: SourceConfig, columns: Sequence[str]) -> str | None:
    if cfg.text_column is None and set(columns) >= CONTRASTIVE_COLUMNS:
        return None
    wanted = (
        [cfg.text_column]
        if cfg.text_column
        else ["text", CHAT_COLUMN, *TOKEN_COLUMNS, *OTHER_CHAT_COLUMNS]
    )
    found = [column for column in wanted if column in columns]
    if not found:
        raise ValueError(
            f"Data set {cfg.dataset_path!r} has no text column {' or '.join(map(repr, wanted))}; its columns are "
            f"{list(columns)}. Name one of them as text_column."
        )
    return found[0]


def is_empty(document: Any) -> bool:
    """Whether a document is empty: null, or without any character, message or token id.

    >>> is_empty(None), is_empty(""), is_empty([]), is_empty(" ")
    (True, True, True, False)
    """
    return document is None or (isinstance(document, Sequence) and len(document) == 0)


def aligned_pieces(
    pair: ModelPair, document: Any, token_owner: Literal["a", "b"] = "a"
) -> Iterator[tuple[Segments, Coverage]]:
    """Split a document into pieces short enough for any tokenizer, and align each piece.

    Args:
        pair: The two models.
        document: Text, chat messages, token ids, or a contrastive row.
        token_owner: Model whose token ids the document holds, if it holds token ids.

    Raises:
        ValueError: The document is of another type.
    """
    if is_empty(document):
        return
    if isinstance(document, str):
        yield from (pair.segments(piece) for piece in split_text(document, MAX_CHARS))
    elif isinstance(document, Mapping) and set(document) >= CONTRASTIVE_COLUMNS:
        yield from (pair.chat_segments(chat) for chat in contrastive_documents(document))
    elif isinstance(document, Sequence) and all(isinstance(item, Mapping) for item in document):
        yield pair.chat_segments(document)
    elif isinstance(document, Sequence) and all(isinstance(item, int) for item in document):
        tokenizer = pair.a.tokenizer if token_owner == "a" else pair.b.tokenizer
        for text in decoded(tokenizer, document):
            yield from aligned_pieces(pair, text)
    else:
        raise ValueError(
            f"A document must be text, chat messages or token ids, got {type(document).__name__}: "
            f"{str(document)[:80]!r}. Name another text_column."
        )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """Decode token ids to texts, split at special tokens.

    Raises:
        ValueError: An id is outside this tokenizer's vocabulary.
    """
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise ValueError(
            f"Token ids from {min(ids)} to {max(ids)} are not in the vocabulary of tokenizer {tokenizer.name_or_path!r} "
            f"({len(tokenizer)} tokens). Set the source's `tokenizer` to the model that they belong to."
        )
    special = set(tokenizer.all_special_ids)
    text: list[int] = []
    for i in [*ids, None]:
        if i is not None and i not in special:
            text.append(i)
        elif text:
            yield str(tokenizer.decode(text, clean_up_tokenization_spaces=False))
            text = []
