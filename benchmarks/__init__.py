"""Benchmarks of crosscoders: recovery of known differences, evaluation measures, and cost; run as
`python -m benchmarks`."""
