"""A pair of models and its text, as a configuration says: what to train on and what to hold out."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sae_lens.training.prefetch import PrefetchingIterator
from tqdm.auto import tqdm

from sae_lens_dfc.activations import Bookmark, PairedRows, paired_activations
from sae_lens_dfc.contexts import (
    Context,
    ContextBatch,
    ContextStream,
    PairCounts,
    Part,
    bucketed,
    in_order,
)
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.sources import Source, SourceConfig
from sae_lens_dfc.stopping import close_soon

BATCHES_AHEAD = 8
# Each has a share of each data set open, when all shares are read one after the other.
MAX_RANKS = 4096
POSITIVE = ("training_pairs", "eval_pairs", "store_batch_size_prompts", "outlier_factor", "n_ranks")


@dataclass
class DataConfig:
    """Two models and the text they read: what training and caching have in common.

    Raises:
        ValueError: A number is out of its range; the message names it.
    """

    model_a: ModelConfig = field(default_factory=ModelConfig)
    """The first model."""
    model_b: ModelConfig = field(default_factory=ModelConfig)
    """The second model."""

    dataset_path: str = "cpython-docs"
    """Hub name, file (.txt, .jsonl, .csv, .parquet), folder written by save_to_disk, or cpython-docs, which ships with Python."""
    dataset_name: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    text_column: str | None = None
    """Column that holds text, chat messages or token ids; none takes the usual one that is there."""
    streaming: bool = True
    """Read a hub data set as it downloads."""
    sources: list[SourceConfig] = field(default_factory=list, metadata={"cmd": False})
    """Several data sets with weights, in place of the one that dataset_path names; in a --config file only."""
    held_out_every: int = 10
    """Each so many-th document is kept from training, for evaluation."""
    training_pairs: int | None = None
    """At most so many distinct pairs are trained on, again and again if need be; none takes the whole text."""
    eval_pairs: int = 20_000
    """At most so many held-out pairs are evaluated."""
    context_size: int = 128
    """Tokens in one context, in either model."""
    store_batch_size_prompts: int = 16
    """Contexts of that size in one forward pass of the models; of shorter ones there are more."""
    autocast_lm: bool = False
    """Run the models in bfloat16 where torch deems it safe."""
    compile_llm: bool = False
    """Compile the models' forward passes with torch.compile."""
    llm_compilation_mode: str | None = None
    """Mode of torch.compile for the models."""
    outlier_factor: float = 2.0
    """A pair is left out when one of its norms is above this many times its model's running median."""
    seed: int = 42
    """Seed of the initial weights and of the shuffle."""
    n_ranks: int = field(default=1, metadata={"cmd": False})
    """Processes that share the text between them; torchrun sets it."""

    def __post_init__(self) -> None:
        require_positive(self, POSITIVE)
        if self.held_out_every < 2:
            raise ValueError(
                f"held_out_every must be at least 2, got {self.held_out_every}: 1 would leave nothing to train on."
            )
        if self.context_size < 2:
            raise ValueError(f"context_size must be at least 2, got {self.context_size}.")
        if self.n_ranks > MAX_RANKS:
            raise ValueError(f"n_ranks must be at most {MAX_RANKS}, got {self.n_ranks}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a number of 64 bits, got {self.seed}.")

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The data sets to read: `sources`, or the one of the flat fields."""
        flat = SourceConfig(
            self.dataset_path,
            text_column=self.text_column,
            dataset_name=self.dataset_name,
            dataset_split=self.dataset_split,
            streaming=self.streaming,
        )
        return self.sources or [flat]


def require_positive(cfg: object, names: Sequence[str]) -> None:
    """Raise ValueError for the first of these settings that is set and not a finite number above 0."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
        if value is not None and value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}. Give a large number.")


def open_pair(cfg: DataConfig) -> ModelPair:
    """Open the two models that `cfg` names, in the way it says.

    Raises:
        ValueError: One of them cannot be opened, or does not fit.
    """
    pair = ModelPair.load(cfg.model_a, cfg.model_b)
    for model in {id(model): model for model in (pair.a, pair.b)}.values():
        model.autocast = cfg.autocast_lm
        if cfg.compile_llm:
            model.compile(cfg.llm_compilation_mode)
    return pair


class Collected(NamedTuple):
    """A part of the text in memory, with what became of it."""

    rows: list[PairedRows]
    contexts: list[Context]
    """By the number that the rows name."""
    counts: PairCounts


class PairedText:
    """The text of `cfg`, read by both models of `pair`.

    Args:
        cfg: What to read.
        pair: The two models.
        rank: Which of the `n_ranks` processes this is, when it reads its share of the text only.

    Raises:
        ValueError: The text cannot be read, has no such column, or its contexts are too long for a model.
    """

    def __init__(self, cfg: DataConfig, pair: ModelPair, rank: int | None = None):
        self.cfg = cfg
        self.pair = pair
        for model in (pair.a, pair.b):
            if cfg.context_size > model.n_ctx:
                raise ValueError(
                    f"context_size={cfg.context_size} is more than model {model.name!r} can read ({model.n_ctx} "
                    "tokens). Lower context_size."
                )
        # Which documents are held out was decided within each process's share: all shares together are the text.
        self.ranks = range(cfg.n_ranks) if rank is None else [rank]
        opened = map(Source.open, cfg.all_sources)
        self.sources = [source.share(r, cfg.n_ranks) for source in opened for r in self.ranks]

    def stream(self, part: Part) -> ContextStream:
        """The contexts of a part of the text, as many as `training_pairs` or `eval_pairs` need."""
        cfg = self.cfg
        n_pairs = cfg.eval_pairs
        if part == "training":
            n_pairs = cfg.training_pairs and -(-cfg.training_pairs * len(self.ranks) // cfg.n_ranks)
        return ContextStream(
            self.pair,
            self.sources,
            cfg.context_size,
            cfg.store_batch_size_prompts,
            part,
            cfg.held_out_every,
            n_pairs,
            cfg.seed,
        )

    def rows(
        self, part: Part, counts: PairCounts, start: Bookmark | None = None
    ) -> Iterator[PairedRows]:
        """Both models' activations at a part of the text, from a place on."""
        place = None if start is None else start.values["text"]
        # Tokenised and aligned in a thread, while the models run.
        batches = PrefetchingIterator(self.stream(part).batches(counts, place), BATCHES_AHEAD)
        try:
            yield from paired_activations(
                self.pair, batches, counts, self.cfg.outlier_factor, start
            )
        finally:
            close_soon(batches)

    def rows_of(
        self, part: Part, contexts: Collection[int], after: Bookmark
    ) -> Iterator[PairedRows]:
        """The rows of some contexts, read once more: the text up to the last of them, and the models on these alone.

        Args:
            part: The part of the text in which they have these numbers.
            contexts: Their numbers.
            after: The bookmark of rows that were read of the part before. Its norms say what an outlier is.
        """
        missing, found = set(contexts), list[Context]()
        for batch in self.stream(part).batches(PairCounts()):
            found += [context for context in batch.contexts if context.number in missing]
            missing -= {context.number for context in batch.contexts}
            if not missing:
                break
        size, longest = self.cfg.store_batch_size_prompts, self.cfg.context_size
        batches = [ContextBatch(b, {}) for b in bucketed(found, size, longest, seed="")]
        factor = self.cfg.outlier_factor
        yield from paired_activations(self.pair, batches, PairCounts(), factor, after)

    def collect(self, part: Part, name: str) -> Collected:
        """Both models' activations at a part of the text, in memory, under a progress bar."""
        counts = PairCounts()
        batches = list(self.stream(part).batches(counts))
        rows = paired_activations(self.pair, batches, counts, self.cfg.outlier_factor)
        bar = tqdm(rows, name, len(batches), unit=" batches")
        return Collected(
            [r._replace(acts=r.acts.cpu(), contexts=()) for r in bar], in_order(batches), counts
        )
