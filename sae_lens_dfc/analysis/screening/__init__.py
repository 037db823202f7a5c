"""Screens all latents for differences between the models, and tests the candidates causally."""
