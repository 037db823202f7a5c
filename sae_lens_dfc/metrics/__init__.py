"""Metrics of a crosscoder, computed from activations."""
