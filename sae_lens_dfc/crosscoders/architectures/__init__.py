"""Crosscoder architectures, one per file."""
