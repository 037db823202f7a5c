"""Defines `TrainingStream`, the endless shuffled batches of a training, from a text, a cache or
activations in memory."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.interrupts import GracefulShutdown
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.data.activations import PairedRows, StatefulBatch, StreamState
from sae_lens_dfc.data.batches import Batches, epochs, epochs_in_memory, shuffled
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


class TrainingStream:
    """This rank's batches of paired activations, repeated without end, shuffled and resumable.

    Args:
        cfg: Batch size, shuffle and seed.
        source: What is read: a text with its models, a cache, or activations in memory.
    """

    def __init__(
        self,
        cfg: CrosscoderRunnerConfig,
        source: PairedText | PairedActivationsCache | Sequence[PairedRows],
    ):
        self.cfg = cfg
        self.source = source
        self.counts = PairCounts()
        """Counts of the text's documents and pairs, over its first pass only."""
        self._is_counted = False

    @property
    def text(self) -> PairedText | None:
        """The text that is read; None for a cache or activations in memory."""
        return self.source if isinstance(self.source, PairedText) else None

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Fingerprints of the cache or the text; none for activations in memory."""
        source = self.source
        return {
            "cache": source.fingerprint if isinstance(source, PairedActivationsCache) else None,
            "text": source.fingerprint if isinstance(source, PairedText) else None,
        }

    @property
    def n_pairs(self) -> int:
        """Number of distinct pairs that were read, on this rank; in a cache, on all ranks."""
        source = self.source
        return len(source) if isinstance(source, PairedActivationsCache) else self.counts.pairs

    def batches(
        self,
        stop: GracefulShutdown,
        start: StreamState | None = None,
        counts: Mapping[str, Any] | None = None,
    ) -> Batches:
        """The batches from a state on, which is that of a checkpoint.

        Args:
            stop: Shutdown request to check before each batch.
            start: State to resume from; None starts at the beginning.
            counts: The counts at that state, as plain values.

        Raises:
            ValueError: The state or the counts are not those of such a stream.
        """
        self.counts, self._is_counted = PairCounts(), False
        if counts is not None:
            self.counts = from_plain(PairCounts, counts, "The counts")
            rows = None if start is None else start.values.get("rows")
            self._is_counted = isinstance(rows, dict) and rows.get("epoch", 0) != 0
        return Batches(self._shuffled(start, stop), self.cfg.prefetch_llm_batches, start, stop)

    def _shuffled(
        self, start: StreamState | None, stop: GracefulShutdown
    ) -> Iterator[StatefulBatch]:
        cfg = self.cfg
        batch_size = cfg.train_batch_size_tokens // distributed.world_size()
        if isinstance(self.source, PairedActivationsCache):
            share = (distributed.rank(), distributed.world_size())
            return self.source.batches(batch_size, cfg.seed, cfg.cache_window_shards, start, share)
        in_memory = cfg.keep_in_memory or not isinstance(self.source, PairedText)
        repeat = epochs_in_memory if in_memory else epochs
        return shuffled(
            lambda place: stop.between(repeat(self._one_pass, place)),
            batch_size,
            cfg.n_batches_in_buffer * batch_size,
            cfg.activations_mixing_fraction,
            cfg.seed,
            start,
        )

    def _one_pass(self, start: StreamState | None) -> Iterator[PairedRows]:
        """One pass over the text or the activations, from a state on."""
        assert not isinstance(self.source, PairedActivationsCache)
        if not isinstance(self.source, PairedText):
            self.counts.pairs = sum(len(rows.acts) for rows in self.source)
            return iter(self.source)
        if self._is_counted:
            return self.source.rows("training", PairCounts(), start)
        self._is_counted = True
        if start is None:
            self.counts = PairCounts()
        return self.source.rows("training", self.counts, start)
