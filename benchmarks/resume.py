"""Continues a benchmark from the rows that its results file already holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from benchmarks.recovery import write
from sae_lens_dfc.core.parsing import read_json
from sae_lens_dfc.core.terminal import said_by

R = TypeVar("R")


def with_missing(
    path: Path,
    runs: Sequence[R],
    settings: Callable[[R], Mapping[str, Any]],
    rows_of: Callable[[R], Iterable[dict[str, Any]]],
    title: str,
) -> list[dict[str, Any]]:
    """The rows of all runs, writing the file after each run; those of existing runs are not
    computed again.

    Args:
        path: File of results.
        runs: The wanted runs.
        settings: Settings that determine a run's results, which its rows have as `settings`.
        rows_of: Computes a run's rows; those of an interrupted run are lost together.
        title: Title of the progress bar.

    Raises:
        ValueError: The file holds results of other settings, or something else.
    """
    rows = resumed(path, [settings(run) for run in runs])
    done = [row["settings"] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in tqdm([run for run in runs if settings(run) not in done], title, unit=" runs"):
        rows += list(rows_of(run))
        write(rows, path)
    return rows


def resumed(path: Path, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        ValueError: The file holds something else, or rows with other settings.
    """
    if not path.exists():
        return []
    try:
        rows = read_json(path, finite=False)
        others = [row for row in rows if row["settings"] not in wanted]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold results of this benchmark: {said_by(error)} Name another --output."
        ) from None
    if others:
        raise ValueError(
            f"{path} holds {len(others)} results with other settings. Name another --output, or delete it."
        )
    return rows
