"""Trains crosscoders: configuration, recipes, runner, trainer and checkpoints."""
