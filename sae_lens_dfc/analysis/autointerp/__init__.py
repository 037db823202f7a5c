"""Auto-interpretability: an LLM judge describes latents, and detection scores how well the
descriptions predict where they fire."""
