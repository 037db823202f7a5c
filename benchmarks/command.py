"""`python -m benchmarks`: runs the benchmarks, or compares two sets of results."""

from benchmarks.options import BenchmarkOptions

OPTIONS = BenchmarkOptions


def run(options: BenchmarkOptions) -> int:
    """Run benchmarks or compare two sets of results; returns the exit status."""
    # Imported here, because `--help` does not need it.
    from benchmarks.suite import benchmark

    return benchmark(options)
