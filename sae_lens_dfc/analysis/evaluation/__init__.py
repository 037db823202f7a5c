"""Evaluates runs together with their baselines and nulls."""
