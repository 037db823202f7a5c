"""Names the three partitions of latents."""

SHARED = "shared"
A_EXCLUSIVE = "a_exclusive"
B_EXCLUSIVE = "b_exclusive"
