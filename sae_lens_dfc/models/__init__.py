"""Opens a language model, runs it up to its hook, and decodes its tokens."""
