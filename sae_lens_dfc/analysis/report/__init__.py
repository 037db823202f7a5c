"""Writes results: tables, the HTML report, the model card, metrics.json and latents.csv."""
