"""Builds model organisms: pairs of models with one known difference."""
