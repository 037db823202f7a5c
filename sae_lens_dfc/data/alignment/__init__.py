"""Aligns two tokenizations of a text at the tokens that end at the same characters."""
