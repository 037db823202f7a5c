"""Analyses of a trained crosscoder. The subpackages import each other in one direction
(docs/architecture.md)."""
