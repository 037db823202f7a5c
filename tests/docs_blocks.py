"""The blocks of code of a Markdown page, fenced and indented, as a reader sees them."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "tutorials/**/*.md", ".github/**/*.md")

SHELL = ("", "bash", "sh", "shell", "console")
"""An indented block has no language: it is commands."""


class Block(NamedTuple):
    language: str
    text: str
    line: int
    """Of the page, from 1."""


def pages() -> list[str]:
    """All Markdown of the repository, by its path."""
    found = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return list(found_in(text))


def found_in(markdown: str) -> Iterator[Block]:
    """Every fenced and indented block.

    >>> [tuple(b) for b in found_in("A list:\\n\\n- ```yaml\\n  a: 1\\n  ```\\n\\nText\\n\\n    make demo\\n")]
    [('yaml', 'a: 1\\n', 4), ('', 'make demo\\n', 9)]
    """
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            first = token.map[0] + (2 if token.type == "fence" else 1)
            # A fence without a language is no commands: it must say what it is.
            language = token.info.strip().split(" ")[0] if token.type == "fence" else ""
            yield Block(language or ("text" if token.type == "fence" else ""), token.content, first)


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a block of shell, their words without comments, and without the folder that
    `make install` makes.

    >>> list(commands("git clone … && cd x  # once\\n.venv/bin/sae-lens-dfc train \\\\\\n  --lr 1\\n"))
    [['git', 'clone', '…'], ['cd', 'x'], ['sae-lens-dfc', 'train', '--lr', '1']]
    """
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word.removeprefix(".venv/bin/"))
            elif words:
                yield words
                words = []
