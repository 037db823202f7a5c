"""Pairs of models whose difference is certain, and the text that shows it."""
