"""Metrics and tests of whether a latent is exclusive to one model."""
