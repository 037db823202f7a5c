"""Scores whether a crosscoder found a planted difference."""
