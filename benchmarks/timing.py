"""Measures times, and summarizes figures over rounds: medians, ranges and targets."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_lens_dfc.core.atomic_write import atomic_file


def timed(do: Callable[[], Any]) -> float:
    """Seconds that `do` takes, including its work on the current GPU."""
    _wait_for_gpu()
    start = time.perf_counter()
    do()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over rounds of each figure.

    >>> medians([{"ms": 3.0}, {"ms": 1.0}, {"ms": 9.0}])
    {'ms': 3.0}
    """
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def ranges(rounds: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The lowest and highest round of each figure.

    >>> ranges([{"ms": 3.0}, {"ms": 1.0}, {"ms": 9.0}])
    {'ms': [1.0, 9.0]}
    """
    return {
        name: [min(r[name] for r in rounds), max(r[name] for r in rounds)] for name in rounds[0]
    }


def write_json_results(results: Mapping[str, Any], path: Path) -> None:
    """Write results as JSON, replacing an existing file."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def figure_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The figures as table rows: name, median, range and target.

    Args:
        results: Figures by name; `spread` holds ranges and `targets` the target values, for those
            that have one.

    >>> figure_rows({"ratio": 1.5, "spread": {"ratio": [1.0, 2.0]}, "targets": {"ratio": "<= 1.9"}})
    [['ratio', '1.500', '1.000 to 2.000', '<= 1.9']]
    """
    return [
        [
            name,
            f"{value:.3f}",
            _range(results["spread"].get(name)),
            results["targets"].get(name, ""),
        ]
        for name, value in results.items()
        if isinstance(value, float)
    ]


def _range(spread: Sequence[float] | None) -> str:
    return "" if spread is None else f"{spread[0]:.3f} to {spread[1]:.3f}"
