"""Results that are kept one by one, so that long work goes on where it stopped."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_lens_dfc.files import parse_json, read_text
from sae_lens_dfc.output import replaced

MAX_PROGRESS = 50_000_000
"""Bytes: what is kept of a latent takes some 10,000, and nobody tests thousands of them."""
MAX_LINE = 1_000_000


class Progress:
    """Results by name in a file of JSON lines, each written as soon as it is there; the first line says what they are of.

    Args:
        path: The file; made with the first result.
        settings: All that decides the results.

    Raises:
        ValueError: The file holds results of other settings, or something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = Progress(Path(folder) / "p.jsonl", {"seed": 0}).done("2 + 2", lambda: 2 + 2)
    ...     Progress(Path(folder) / "p.jsonl", {"seed": 0}).done("2 + 2", lambda: 1 / 0)
    4
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self.results: dict[str, Any] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = read_text(self.path, MAX_PROGRESS).split("\n")
        # A line without its end is one that was being written.
        whole = [line for line in lines[:-1] if line]
        try:
            first, *others = map(_parsed, whole) if whole else ({"settings": None},)
            self.results = {one["name"]: one["result"] for one in others}
            is_ours = not whole or first["settings"] == self._settings
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a file of results that were being made ({error!r}). Move it, or name another --output."
            ) from None
        if not is_ours:
            raise ValueError(
                f"{self.path} holds what was made so far with other settings. Give the same to go on, delete it to begin "
                "anew, or name another --output."
            )
        if whole != lines[:-1] or lines[-1]:
            # A line without its end would be joined to the next.
            with replaced(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in whole), encoding="utf-8")

    def done(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name, made if it is not there; JSON can hold it."""
        if name not in self.results:
            self._keep(name, make())
        return self.results[name]

    def _keep(self, name: str, result: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps({"settings": self._settings}) + "\n")
            file.write(json.dumps({"name": name, "result": result}) + "\n")
        self.results[name] = json.loads(json.dumps(result))

    def forget(self) -> None:
        """Remove the file: its results are elsewhere."""
        self.path.unlink(missing_ok=True)


def _parsed(line: str) -> Any:
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line):,} characters")
    return parse_json(line, finite=False)
