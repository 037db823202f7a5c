"""`sae-lens-dfc cache`: caches both models' activations on disk."""

from dataclasses import dataclass

from sae_lens_dfc.core.terminal import print_result
from sae_lens_dfc.data.config import CacheConfig


@dataclass(kw_only=True)
class CacheOptions(CacheConfig):
    """Cache both models' activations on a text, so that `train` can reuse them."""


OPTIONS = CacheOptions


def run(options: CacheOptions) -> None:
    """Write a cache, in parallel with other processes if started by torchrun."""
    # Imported here, because `--help` does not need them.
    from sae_lens_dfc.core import distributed
    from sae_lens_dfc.data.cache.build import cache_activations
    from sae_lens_dfc.data.paired_text import of_this_rank

    devices = options.model_a.device, options.model_b.device
    with distributed.process_group(next((d for d in devices if d != "cpu"), "cpu")):
        cached = cache_activations(of_this_rank(options))
        if distributed.rank() == 0:
            coverage = cached.counts.coverage
            print_result(
                f"Cache: {cached.folder}, {len(cached):,} rows of {cached.d_a} + {cached.d_b}"
            )
            print_result(f"Paired: {coverage.a:.1%} of A's tokens, {coverage.b:.1%} of B's")
