"""Computes statistics of tensors, independent of any model or crosscoder."""
