"""Handles files, locks, interrupts, processes and the terminal, independent of models and text."""
