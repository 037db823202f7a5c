"""Runs the benchmarks as a suite, writes tables and plots, and compares two sets of results."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.certain.run import run_certain_benchmark
from benchmarks.data import FILENAME as DATA_FILENAME
from benchmarks.data import run_data_benchmark
from benchmarks.evaluate import run_evaluate_benchmark
from benchmarks.options import BenchmarkOptions, StepConfig
from benchmarks.planted.run import run_planted_benchmark
from benchmarks.recovery import FILENAME as RECOVERY_FILENAME
from benchmarks.recovery import run_benchmark
from benchmarks.step import run_step_benchmark
from benchmarks.tables.certain_tables import certain_tables
from benchmarks.tables.compare import Figure, compare, comparison_table, other_lines
from benchmarks.tables.figures import (
    certain_figures,
    data_figures,
    evaluate_figures,
    planted_figures,
    recovery_figures,
    step_figures,
)
from benchmarks.tables.planted_tables import planted_tables
from benchmarks.tables.plots import (
    certain_plot,
    data_plot,
    evaluate_plot,
    planted_plot,
    recovery_plot,
    step_plot,
)
from benchmarks.tables.tables import (
    Rows,
    Table,
    data_tables,
    evaluate_tables,
    step_tables,
    tables,
)
from sae_lens_dfc.analysis.evaluation.demo import demo_models
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.core.output_folder import file_lock
from sae_lens_dfc.core.parsing import read_json
from sae_lens_dfc.core.terminal import print_result, said_by, text_table
from sae_lens_dfc.data.pair import ModelPair

logger = logging.getLogger(__name__)

STEPS: Mapping[str, list[dict[str, Any]]] = {
    "small": [{"rounds": 3}],
    "full": [
        {"dtype": dtype, "d_sae": d_sae}
        for dtype in ("float32", "bfloat16")
        for d_sae in (8192, 32768)
    ],
}
"""Step configurations measured by `all`."""


class Benchmark(NamedTuple):
    """One benchmark of the suite. Its results are rows from one or more files."""

    run: Callable[[BenchmarkOptions, Path], object]
    """Runs the benchmark and writes its results to a folder, as NAME.json or NAME-PART.json."""
    tables: Callable[[Rows], Iterator[Table]]
    """Tables of the results; the first is the overview."""
    figures: Callable[[Rows], Iterator[Figure]]
    """Figures to compare."""
    plot: Callable[[Rows, Path], None]
    mark: str
    """A field unique to its rows."""


def _step(options: BenchmarkOptions, folder: Path) -> None:
    if options.name == "step":
        run_step_benchmark(options, folder)
        return
    for changes in STEPS[options.preset]:
        cfg = StepConfig(reference=options.reference, **changes)
        name = f"step-{cfg.dtype}-{cfg.d_sae}.json"
        if _is_there(folder / name, {"rounds": cfg.rounds, "dtype": cfg.dtype}, "settings"):
            continue
        run_step_benchmark(cfg, folder, name)


def _data(options: BenchmarkOptions, folder: Path) -> None:
    if options.name == "all" and _is_there(folder / DATA_FILENAME, {"preset": options.preset}):
        return
    run_data_benchmark(options.preset, ModelPair.load(*demo_models(DemoConfig())), folder)


def _is_there(path: Path, wanted: Mapping[str, Any], part: str | None = None) -> bool:
    """Whether a file exists with results of these settings.

    Raises:
        ValueError: It holds something else.
    """
    if not path.exists():
        return False
    (row,) = read_rows(path)
    settings = row if part is None else row.get(part, {})
    differs = {name: settings.get(name) for name in wanted if settings.get(name) != wanted[name]}
    if differs:
        raise ValueError(
            f"{path} holds results of other settings: {differs}, wanted {dict(wanted)}. Name another --output, or delete it."
        )
    return True


SUITE: dict[str, Benchmark] = {
    # Timed benchmarks run first, in a fresh process.
    "step": Benchmark(_step, step_tables, step_figures, step_plot, "speedup_over_saelens"),
    "data": Benchmark(_data, data_tables, data_figures, data_plot, "harvest_ratio"),
    "evaluate": Benchmark(
        lambda options, folder: run_evaluate_benchmark(options.preset, folder),
        evaluate_tables,
        evaluate_figures,
        evaluate_plot,
        "case",
    ),
    "planted": Benchmark(
        lambda options, folder: run_planted_benchmark(options.preset, folder),
        planted_tables,
        planted_figures,
        planted_plot,
        "organism",
    ),
    "certain": Benchmark(
        lambda options, folder: run_certain_benchmark(options.preset, folder),
        certain_tables,
        certain_figures,
        certain_plot,
        "certain_case",
    ),
    "recovery": Benchmark(
        lambda options, folder: run_benchmark(
            options.preset, folder / RECOVERY_FILENAME, options.jobs
        ),
        tables,
        recovery_figures,
        recovery_plot,
        "d_sae_per_feature",
    ),
}


def benchmark(options: BenchmarkOptions) -> int:
    """Run missing benchmarks, then write and print tables and plots; or compare. Returns the exit
    status."""
    _check(options)
    if options.name == "compare":
        return compare_results(*map(Path, options.paths), as_json=options.json)
    kind = "step" if options.name == "step" else options.preset
    folder = Path(options.output or f"runs/benchmark/{kind}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is not a folder. Give a folder.")
    with file_lock(folder):
        return _benchmark(options, folder)


def _benchmark(options: BenchmarkOptions, folder: Path) -> int:
    if options.name != "all":
        SUITE[options.name].run(options, folder)
        _say(present(folder, options.name), folder / options.name)
        return 0
    failed = run_all(options, folder)
    print_result(f"Results: {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _check(options: BenchmarkOptions) -> None:
    if options.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {options.jobs}.")
    given = [f.name for f in fields(StepConfig) if getattr(options, f.name) != f.default]
    if options.name == "all":
        given = [name for name in given if name != "reference"]
    if options.name != "step" and given:
        raise ValueError(f"{', '.join(given)}: for `step`, not for {options.name}. Leave them out.")
    n_paths = 2 if options.name == "compare" else 0
    if len(options.paths) != n_paths:
        raise ValueError(
            f"`{options.name}` takes {n_paths or 'no'} folders or files, got {len(options.paths)}"
            f"{': ' if options.paths else ''}{' '.join(options.paths)}. Results are compared by `python -m benchmarks compare OLD NEW`."
        )


def run_all(options: BenchmarkOptions, folder: Path) -> list[str]:
    """Run the suite; returns the names of failed benchmarks, which do not stop the others."""
    failed: list[str] = []
    for name, one in SUITE.items():
        logger.info("Benchmark %s, preset %s", name, options.preset)
        try:
            one.run(options, folder)
            _say(present(folder, name)[:1], folder / name)
        except Exception:
            logger.exception("Benchmark %s failed", name)
            failed.append(name)
    return failed


def _say(found: Iterable[Table], path: Path) -> None:
    for table in found:
        print_result(f"{table.title}\n{text_table(table.cells[0], table.cells[1:])}\n")
    print_result(f"Results: {path}*.json; tables: {path}.md; picture: {path}.svg")


def present(folder: Path, name: str) -> list[Table]:
    """Write one benchmark's results in a folder as tables (NAME.md) and plot (NAME.svg); returns
    the tables."""
    one, rows = SUITE[name], results_in(folder)[name]
    found = list(one.tables(rows))
    text = "\n\n".join(table.markdown() for table in found)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    one.plot(rows, folder / f"{name}.svg")
    return found


def results_in(path: Path) -> dict[str, Rows]:
    """The rows in a folder or file, by benchmark.

    Raises:
        ValueError: There are no results, or a file is not JSON.
    """
    if path.is_dir():
        files = {
            name: sorted([*path.glob(f"{name}.json"), *path.glob(f"{name}-*.json")])
            for name in SUITE
        }
        found = {
            name: [row for p in paths for row in read_rows(p)] for name, paths in files.items()
        }
    else:
        rows = read_rows(path)
        found = {name: rows for name, one in SUITE.items() if all(one.mark in row for row in rows)}
    found: dict[str, Rows] = {name: rows for name, rows in found.items() if rows}
    if not found:
        raise ValueError(
            f"{path} has no results of {', '.join(SUITE)}. Give a folder written by `python -m benchmarks`, or one of its JSON files."
        )
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in a results file, which holds one row or a list.

    Raises:
        ValueError: The file is not JSON or holds no rows.
    """
    try:
        content = read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of results: {said_by(error)}") from error
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of results: it must hold rows, each a JSON object.")
    return rows


def compare_results(old: Path, new: Path, as_json: bool = False) -> int:
    """Print differences between two sets of results beyond noise; returns 1 if anything is worse,
    else 0.

    Raises:
        ValueError: One of them has no results.
    """
    comparisons = compare(figures_of(old), figures_of(new))
    if as_json:
        print_result(json.dumps([comparison._asdict() for comparison in comparisons]))
    else:
        head, *rows = comparison_table(comparisons)
        print_result(text_table(head, rows) if rows else "No figure differs beyond noise.")
        print_result("\n" + "\n".join(other_lines(comparisons)))
    return int(any(comparison.flag == "worse" for comparison in comparisons))


def figures_of(path: Path) -> list[Figure]:
    """The figures of all results in a folder or file, prefixed with the benchmark's name.

    Raises:
        ValueError: There are no results, or rows not written by a benchmark.
    """
    try:
        figures = [
            replace(figure, name=f"{name}: {figure.name}")
            for name, rows in results_in(path).items()
            for figure in SUITE[name].figures(rows)
        ]
        numbers = [n for one in figures for n in (*one.values.values(), *(one.range or ()))]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("a figure is no number.")
    except (KeyError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"{path} has rows that no benchmark wrote: {said_by(error)} Give a folder written by `python -m benchmarks`."
        ) from error
    return figures
