"""Names the three partitions of latents."""

from sae_lens_dfc.models.config import ModelName

SHARED = "shared"
A_EXCLUSIVE = "a_exclusive"
B_EXCLUSIVE = "b_exclusive"
EXCLUSIVE_TO: dict[ModelName, str] = {"a": A_EXCLUSIVE, "b": B_EXCLUSIVE}
"""The partition of the latents that only one model has."""
