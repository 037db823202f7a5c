"""`sae-lens-dfc benchmark`: runs the benchmarks, or compares two sets of results."""

from sae_lens_dfc.benchmark.options import BenchmarkOptions

OPTIONS = BenchmarkOptions


def run(options: BenchmarkOptions) -> int:
    """Run benchmarks or compare two sets of results; returns the exit status."""
    # Imported here, because `--help` does not need it.
    from sae_lens_dfc.benchmark.suite import benchmark

    return benchmark(options)
