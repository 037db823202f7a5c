"""Causal metrics: run the models with changed activations."""
