"""Steering: generates text and computes losses with activations changed at a model's hook."""
