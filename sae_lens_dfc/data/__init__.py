"""Turns text into shuffled batches of two models' paired activations."""
