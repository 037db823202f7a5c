"""Measures whether calls with evidence are right on toy pairs, where the truth is known, with
features that fire together too.

    .venv/bin/python -m benchmarks.evidence [--output benchmarks/results/evidence.json] [--jobs 2]

The other pairs are those of `python -m benchmarks recovery --preset full`. Half an hour on two
cores.
"""

import argparse
from pathlib import Path

from benchmarks.recovery import PRESETS, Run, run_missing

PRESET = "full"
ARCHITECTURES = ("dfc", "dfc-reassigned")
CORRELATION = 0.3
"""Scale of the correlations between features that fire together."""


def runs() -> list[Run]:
    """Both DFCs at two sizes, on the null, and with features that fire together; seed by seed."""
    return [
        Run(PRESET, name, size, seed, 0.0, null, correlation)
        for seed in range(PRESETS[PRESET].seeds)
        for name in ARCHITECTURES
        for size, null, correlation in (
            (1.0, False, 0.0),
            (2.0, False, 0.0),
            (1.0, True, 0.0),
            (1.0, False, CORRELATION),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", default="benchmarks/results/evidence.json", help="results file")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    run_missing(runs(), Path(args.output), args.jobs)


if __name__ == "__main__":
    main()
