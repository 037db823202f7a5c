"""Where training text comes from: one or several data sets of text, chat, token ids or pairs of answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.alignment import Coverage
from sae_lens_dfc.chat import contrastive_documents
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.texts import Place, Rows, open_rows, split_text

# Long enough for any sentence-level effect, short enough for tokenizers that take quadratic time.
MAX_CHARS = 20_000
CHAT_COLUMN = "messages"
TOKEN_COLUMNS = ("input_ids", "tokens")
CONTRASTIVE_COLUMNS = {"prompt", "completion_a", "completion_b"}


@dataclass
class SourceConfig:
    """One data set of the stream, and how much of the stream it is.

    Its rows are text, or chat (a column of messages, each with role and content), or token ids (decoded
    to text, which the other model needs), or contrastive (`prompt`, `completion_a`, `completion_b`, see
    `sae-lens-dfc generate`: both models read both answers).

    Raises:
        ValueError: The weight is not above 0.
    """

    dataset_path: str
    """Hub name, file (.txt, .jsonl, .csv, .parquet), folder written by save_to_disk, or cpython-docs."""
    weight: float = 1.0
    """Share of the pairs that come from it, relative to the other sources' weights."""
    text_column: str | None = None
    """Column to read; none takes text, messages, input_ids or tokens, whichever there is, or the two completions."""
    dataset_name: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    streaming: bool = True
    """Read a hub data set as it downloads."""
    tokenizer: Literal["a", "b"] = "a"
    """Whose token ids a pre-tokenised data set holds."""
    max_unreadable: float = 0.01
    """Share of documents that may be left out since they cannot be read, such as chats that a template refuses."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"The weight of source {self.dataset_path!r} must be above 0, got {self.weight}."
            )


class Source:
    """A data set whose documents can be read from any place on.

    Args:
        cfg: What to read of it, and its weight.
        rows: Its rows.

    Raises:
        ValueError: No column of it can be read.

    >>> from datasets import Dataset
    >>> source = Source(SourceConfig("mine"), Rows(Dataset.from_dict({"text": ["a", "b"]}), "mine"))
    >>> [document for document, _ in source.read()]
    ['a', 'b']
    """

    def __init__(self, cfg: SourceConfig, rows: Rows):
        self.cfg = cfg
        self.rows = rows
        self.column = _column(cfg, rows.columns)
        """The column that is read; none for contrastive rows, of which all three are."""

    @classmethod
    def open(cls, cfg: SourceConfig) -> "Source":
        """The data set that `cfg` names.

        Raises:
            ValueError: There is no such data set, or no column of it can be read.
        """
        rows = open_rows(
            cfg.dataset_path,
            cfg.text_column or "text",
            cfg.dataset_split,
            cfg.streaming,
            cfg.dataset_name,
        )
        return cls(cfg, rows)

    def share(self, rank: int, world_size: int) -> "Source":
        """The part that one of several processes reads."""
        return self if world_size == 1 else Source(self.cfg, self.rows.share(rank, world_size))

    @property
    def fingerprint(self) -> str:
        """A sign of the data, see `Rows.fingerprint`."""
        return self.rows.fingerprint

    def check_unreadable(self, n_unreadable: int, n_documents: int, error: ValueError) -> None:
        """Raise when too many documents cannot be read: the first already, since then all may be so.

        Raises:
            ValueError: The last document's error, with the source and the document named.
        """
        if n_documents > 1 and n_unreadable <= max(1, self.cfg.max_unreadable * n_documents):
            return
        raise ValueError(
            f"{n_unreadable} of the {n_documents} documents of {self.cfg.dataset_path!r} read so far cannot be read, "
            f"more than max_unreadable={self.cfg.max_unreadable:g} allows. The last, number {n_documents - 1}: {error}"
        ) from error

    def read(self, place: Place | None = None) -> Iterator[tuple[Any, Place]]:
        """Each document (a value of the column, or a whole contrastive row) with the place after it."""
        for row, after in self.rows.read(place):
            yield (row if self.column is None else row[self.column]), after


def _column(cfg: SourceConfig, columns: Sequence[str]) -> str | None:
    if cfg.text_column is None and set(columns) >= CONTRASTIVE_COLUMNS:
        return None
    wanted = [cfg.text_column] if cfg.text_column else ["text", CHAT_COLUMN, *TOKEN_COLUMNS]
    found = [column for column in wanted if column in columns]
    if not found:
        raise ValueError(
            f"Data set {cfg.dataset_path!r} has no text column {' or '.join(map(repr, wanted))}; its columns are "
            f"{list(columns)}. Name one of them as text_column."
        )
    return found[0]


def aligned_pieces(
    pair: ModelPair, document: Any, token_owner: Literal["a", "b"] = "a"
) -> Iterator[tuple[Segments, Coverage]]:
    """A document, cut where both models have read the same of it, in pieces short enough for every tokenizer.

    Args:
        pair: The two models.
        document: Text, chat messages, token ids, or a contrastive row.
        token_owner: Whose token ids they are, if they are.

    Raises:
        ValueError: It is none of these.
    """
    if document is None or (isinstance(document, Sequence) and len(document) == 0):
        return
    if isinstance(document, str):
        yield from (pair.segments(piece) for piece in split_text(document, MAX_CHARS))
    elif isinstance(document, Mapping):
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
    """The texts that token ids stand for; special tokens, which no text has, part them.

    Raises:
        ValueError: An id is not of this tokenizer.
    """
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise ValueError(
            f"Token ids from {min(ids)} to {max(ids)} are not of tokenizer {tokenizer.name_or_path!r} "
            f"({len(tokenizer)} tokens). Set the source's `tokenizer` to the model they were made for."
        )
    special = set(tokenizer.all_special_ids)
    text: list[int] = []
    for i in [*ids, None]:
        if i is not None and i not in special:
            text.append(i)
        elif text:
            yield str(tokenizer.decode(text, clean_up_tokenization_spaces=False))
            text = []
