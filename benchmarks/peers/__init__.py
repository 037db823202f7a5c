"""Trainers of other libraries, for comparison."""
