"""Reads the training or held-out part of the text with both models and yields paired
activations."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from sae_lens.training.prefetch import PrefetchingIterator
from tqdm.auto import tqdm

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.interrupts import close_soon
from sae_lens_dfc.data.activations import PairedRows, StreamState, paired_activations
from sae_lens_dfc.data.config import DataConfig
from sae_lens_dfc.data.contexts import (
    Context,
    ContextBatch,
    ContextStream,
    PairCounts,
    Part,
    bucketed,
    in_order,
)
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import Source, source_names
from sae_lens_dfc.data.text.fingerprints import fingerprint_of_value
from sae_lens_dfc.models.loading import in_fast_format, or_base_of
from sae_lens_dfc.models.number_formats import FORMATS

BATCHES_AHEAD = 8
MAX_GROUPS = 100
"""Maximum number of values of a column that groups a text: each is measured by itself."""


T_DATA = TypeVar("T_DATA", bound=DataConfig)


def with_models_settled(cfg: T_DATA, begun: Mapping[str, Any] | None = None) -> T_DATA:
    """Resolve the settings: an unnamed model A becomes the base of model B's adapter, and each
    dtype `auto` becomes a concrete dtype.

    Args:
        cfg: The settings.
        begun: Settings of the run to resume, as plain values; each model keeps its dtype. If None,
            `auto` depends on each model's device.

    Raises:
        ValueError: A device is not available, or an adapter cannot be read.
    """
    begun = begun or {}
    model_a = in_fast_format(or_base_of(cfg.model_a, cfg.model_b), _dtype(begun.get("model_a")))
    model_b = in_fast_format(cfg.model_b, _dtype(begun.get("model_b")))
    return replace(cfg, model_a=model_a, model_b=model_b)


def _dtype(model: Any) -> str | None:
    """The dtype in a model's settings; None if it is missing or unknown."""
    dtype = model.get("dtype") if isinstance(model, Mapping) else None
    return dtype if dtype in FORMATS else None


def chosen_formats(cfg: DataConfig) -> list[tuple[str, str]]:
    """The dtypes that `auto` was resolved to, each with its device."""
    models = (cfg.model_a, cfg.model_b)
    return [(model.dtype, model.device) for model in models if model.dtype_was_auto]


def of_this_rank(cfg: T_DATA) -> T_DATA:
    """The settings with this rank's devices for the models."""
    return replace(
        cfg,
        n_ranks=distributed.world_size(),
        model_a=replace(cfg.model_a, device=distributed.own_device(cfg.model_a.device)),
        model_b=replace(cfg.model_b, device=distributed.own_device(cfg.model_b.device)),
    )


def open_pair(cfg: DataConfig) -> ModelPair:
    """Load the two models that `cfg` names, with its autocast and compile settings.

    Raises:
        ValueError: A model cannot be loaded or is unsupported.
    """
    return as_asked(ModelPair.load(cfg.model_a, cfg.model_b), cfg)


def as_asked(pair: ModelPair, cfg: DataConfig) -> ModelPair:
    """Apply the autocast and compile settings of `cfg` to loaded models."""
    for model in {id(model): model for model in (pair.a, pair.b)}.values():
        model.autocast = cfg.autocast_lm
        if cfg.compile_llm:
            model.compile(cfg.llm_compilation_mode)
    return pair


class Collected(NamedTuple):
    """Activations of a part of the text in memory, with their contexts and counts."""

    rows: list[PairedRows]
    contexts: list[Context]
    """Indexed by `PairedRows.context`."""
    counts: PairCounts


class PairedText:
    """The text of `cfg`, read by both models of `pair`.

    Args:
        cfg: What to read.
        pair: The two models.
        rank: Which of the `n_ranks` ranks this is, if it reads only its own share of the text.
        by: Column whose values are the groups of the documents; none groups them by data set.

    Raises:
        ValueError: The text cannot be read, lacks a column, or `context_size` exceeds a model's
            context length.
    """

    def __init__(
        self, cfg: DataConfig, pair: ModelPair, rank: int | None = None, by: str | None = None
    ):
        self.cfg = cfg
        self.pair = pair
        self.by = by
        for model in (pair.a, pair.b):
            if cfg.context_size > model.n_ctx:
                raise ValueError(
                    f"context_size={cfg.context_size} is more than model {model.name!r} can read ({model.n_ctx} "
                    "tokens). Lower context_size."
                )
        # Documents are held out within each rank's share, so one process reads all the shares.
        self.ranks = range(cfg.n_ranks) if rank is None else [rank]
        named = zip(cfg.all_sources, source_names(cfg.all_sources), strict=True)
        opened = (Source.open(source, name, by) for source, name in named)
        self.sources = [source.share(r, cfg.n_ranks) for source in opened for r in self.ranks]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprints of each data set's rows and, if any are chats, of the chat templates."""
        signs: dict[str, Any] = {
            f"source_{i}": source.fingerprint for i, source in enumerate(self.sources)
        }
        if any(source.is_chat for source in self.sources):
            for name, model in self.pair.models.items():
                template = model.tokenizer.chat_template
                signs[f"chat_template_{name}"] = fingerprint_of_value(template)
        return signs

    def stream(self, part: Part) -> ContextStream:
        """The contexts of a part of the text, limited to `max_unique_pairs` or `eval_pairs`."""
        cfg = self.cfg
        n_pairs = cfg.eval_pairs
        if part == "training":
            n_pairs = cfg.max_unique_pairs and -(
                -cfg.max_unique_pairs * len(self.ranks) // cfg.n_ranks
            )
        return ContextStream(
            self.pair,
            self.sources,
            cfg.context_size,
            cfg.store_batch_size_prompts,
            part,
            cfg.eval_every_n_documents,
            n_pairs,
            cfg.seed,
        )

    def rows(
        self, part: Part, counts: PairCounts, start: StreamState | None = None
    ) -> Iterator[PairedRows]:
        """Both models' activations on a part of the text, from `start` on."""
        place = None if start is None else start.values["text"]
        # Tokenized and aligned in a thread while the models run.
        batches = PrefetchingIterator(self.stream(part).batches(counts, place), BATCHES_AHEAD)
        try:
            yield from paired_activations(
                self.pair, batches, counts, self.cfg.outlier_factor, start
            )
        finally:
            close_soon(batches)

    def rows_of(
        self, part: Part, contexts: Collection[int], after: StreamState
    ) -> Iterator[PairedRows]:
        """Recompute the rows of some contexts: reads the text up to the last of them and runs the
        models on these contexts only.

        Args:
            part: The part of the text in which the contexts are numbered.
            contexts: Numbers of the contexts.
            after: State of an earlier pass over this part; its norms define what counts as an
                outlier.
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
        """Both models' activations on a part of the text, in memory, with a progress bar.

        Raises:
            ValueError: The column that groups it has more than `MAX_GROUPS` values.
        """
        counts = PairCounts()
        batches = list(self.stream(part).batches(counts))
        if self.by is not None:
            check_groups({context.group for batch in batches for context in batch.contexts})
        rows = paired_activations(self.pair, batches, counts, self.cfg.outlier_factor)
        bar = tqdm(rows, name, len(batches), unit=" batches")
        return Collected(
            [r._replace(acts=r.acts.cpu(), contexts=()) for r in bar], in_order(batches), counts
        )


def check_groups(names: Collection[str]) -> None:
    """Refuse more than `MAX_GROUPS` groups.

    Raises:
        ValueError: There are more.
    """
    if len(names) > MAX_GROUPS:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"The documents fall into {len(names)} groups ({some} …), and at most {MAX_GROUPS} are measured. Name a column with fewer values."
        )
