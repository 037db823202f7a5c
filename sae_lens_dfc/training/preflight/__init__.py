"""Checks a training before it runs, and estimates its time, memory and disk space."""
