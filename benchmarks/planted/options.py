"""Names the organisms of the benchmark of planted differences."""

from sae_lens_dfc.organisms.options import ORGANISM_NAMES

NULL = "null"
"""Name of the null organism, in which nothing is planted: model A twice."""
FULL = (*ORGANISM_NAMES, NULL)
