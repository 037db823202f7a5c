"""Opens weights and adapters, and refuses models that would not run as in transformers."""
