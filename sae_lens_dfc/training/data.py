"""A pair of models and a text, as a configuration says: what to train on and what to hold out."""

from collections.abc import Iterable, Iterator, Sequence

from tqdm.auto import tqdm

from sae_lens_dfc.activations import (
    PairCounts,
    PairedRows,
    aligned_contexts,
    paired_activations,
)
from sae_lens_dfc.alignment import Segment
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import held_out, load_texts, training_part
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


class PairedText:
    """The text of `cfg`, read by both models of `pair`.

    Raises:
        ValueError: The text cannot be read, has no such column, or its contexts are too long for a model.
    """

    def __init__(self, cfg: CrosscoderRunnerConfig, pair: ModelPair):
        self.cfg = cfg
        self.pair = pair
        for model in (pair.a, pair.b):
            if cfg.context_size > model.n_ctx:
                raise ValueError(
                    f"context_size={cfg.context_size} is more than model {model.name!r} can read ({model.n_ctx} "
                    "tokens). Lower context_size."
                )
        self.texts = load_texts(
            cfg.dataset_path, cfg.text_column, cfg.dataset_split, cfg.streaming, cfg.dataset_name
        )

    def training_contexts(self, counts: PairCounts) -> Iterator[list[Segment]]:
        """The contexts of the training text, as many as `training_pairs` need."""
        texts = training_part(self.texts, self.cfg.held_out_every)
        contexts = aligned_contexts(self.pair, texts, self.cfg.context_size, counts)
        n_pairs = self.cfg.training_pairs
        return contexts if n_pairs is None else take_pairs(contexts, n_pairs)

    def held_out_contexts(self, counts: PairCounts) -> Iterator[list[Segment]]:
        """The contexts kept from training, as many as `eval_pairs` need."""
        texts = held_out(self.texts, self.cfg.held_out_every)
        contexts = aligned_contexts(self.pair, texts, self.cfg.context_size, counts)
        return take_pairs(contexts, self.cfg.eval_pairs)

    def all_contexts(self, counts: PairCounts) -> Iterator[list[Segment]]:
        """The contexts of all of the text, as many as `eval_pairs` need: for a text that was not trained on."""
        contexts = aligned_contexts(self.pair, self.texts, self.cfg.context_size, counts)
        return take_pairs(contexts, self.cfg.eval_pairs)

    def rows(
        self, contexts: Iterable[Sequence[Segment]], counts: PairCounts
    ) -> Iterator[PairedRows]:
        """Both models' activations at these contexts."""
        return paired_activations(
            self.pair,
            contexts,
            counts,
            self.cfg.store_batch_size_prompts,
            self.cfg.outlier_factor,
        )

    def collect(
        self, contexts: Sequence[Sequence[Segment]], counts: PairCounts, name: str
    ) -> list[PairedRows]:
        """Both models' activations at these contexts, in memory, under a progress bar."""
        n_batches = -(-len(contexts) // self.cfg.store_batch_size_prompts)
        bar = tqdm(self.rows(contexts, counts), name, n_batches, unit=" batches")
        return [rows._replace(acts=rows.acts.cpu()) for rows in bar]


def take_pairs(contexts: Iterable[list[Segment]], n_pairs: int) -> Iterator[list[Segment]]:
    """The first contexts that hold `n_pairs` pairs between them, the last one cut short.

    >>> contexts = [[Segment((), ())] * 4, [Segment((), ())] * 4]
    >>> [len(context) - 1 for context in take_pairs(contexts, n_pairs=5)]
    [3, 2]
    """
    for context in contexts:
        if n_pairs <= 0:
            return
        yield context[: n_pairs + 1]
        n_pairs -= len(context) - 1
