"""Crosscoders: configuration, forward pass, saved form and export."""
