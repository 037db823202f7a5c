"""Planted differences: model organisms, and whether crosscoders find what was planted."""
