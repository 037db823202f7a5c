"""Stores results one by one in a file of JSON lines, so that long work can be resumed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_lens_dfc.core.atomic_write import atomic_file
from sae_lens_dfc.core.parsing import parse_json, read_text
from sae_lens_dfc.core.terminal import said_by

MAX_PROGRESS = 50_000_000
"""Maximum file size in bytes; a latent takes about 10,000, so this allows for thousands of
latents."""
MAX_LINE = 1_000_000


class Journal:
    """Results by name in a file of JSON lines, each written as soon as it is computed; the first
    line records the settings.

    Args:
        path: The file, created with the first result.
        settings: Everything that determines the results.

    Raises:
        ValueError: The file holds results of other settings, or something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = Journal(Path(folder) / "p.jsonl", {"seed": 0}).done("2 + 2", lambda: 2 + 2)
    ...     Journal(Path(folder) / "p.jsonl", {"seed": 0}).done("2 + 2", lambda: 1 / 0)
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
        # A line without a newline was interrupted while being written.
        whole = [line for line in lines[:-1] if line]
        try:
            first, *others = map(_parsed, whole) if whole else ({"settings": None},)
            self.results = {one["name"]: one["result"] for one in others}
            is_ours = not whole or first["settings"] == self._settings
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a file of results in progress: {said_by(error)} Move it, or name another --output."
            ) from None
        if not is_ours:
            raise ValueError(
                f"{self.path} holds partial results of other settings. Give the same settings to resume, delete it to start "
                "anew, or name another --output."
            )
        if whole != lines[:-1] or lines[-1]:
            # The next result would be appended to an unfinished line.
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in whole), encoding="utf-8")

    def done(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the named result, computing and storing it if it is missing; it must be
        JSON-serializable."""
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
        """Remove the file, once its results are stored elsewhere."""
        self.path.unlink(missing_ok=True)


def _parsed(line: str) -> Any:
    if len(line) > MAX_LINE:
        raise ValueError(f"it has a line of {len(line):,} characters.")
    return parse_json(line, finite=False)
