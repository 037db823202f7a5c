"""Caches paired activations on disk."""
