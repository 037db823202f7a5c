"""Provides a text that every installation has: the documentation of Python's standard library."""

import ast
import random
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from tqdm.auto import tqdm

_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "pydoc_data",
}


@lru_cache(maxsize=1)
def cpython_docs() -> list[str]:
    """English prose that ships with Python: its reference pages and the docstrings of its standard
    library, about 2 MB.

    Documents are in a fixed random order, so that any contiguous part is a random sample. Repeated
    paragraphs are kept once: 17 % of the reference pages is repeated and would otherwise be both
    trained on and held out.
    """
    documents = [*reference_pages(), *library_docstrings()]
    random.Random(0).shuffle(documents)
    return list(without_repeats(documents))


def reference_pages() -> list[str]:
    """The `help()` pages of Python's keywords and topics."""
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
            continue  # some files are invalid on purpose, to test the parser
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(d for d in docstrings if d):
            yield text


def without_repeats(documents: Iterable[str], min_chars: int = 80) -> Iterator[str]:
    """Remove paragraphs of at least `min_chars` characters that an earlier document contains.

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
