"""Defines the settings of two models, their text and an activation cache."""

from dataclasses import dataclass, field
from typing import Literal

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.schema import check_seed, require
from sae_lens_dfc.models.config import ModelConfig

MAX_FIT_PAIRS = 50_000
"""Pairs used to fit the affine maps between the models; on the demo's pair, twice as many explain
no more variance."""

CPYTHON_DOCS = "cpython-docs"
# Reading all shares one after the other keeps one reader open for each rank and data set.
MAX_RANKS = 4096
POSITIVE = (
    "max_unique_pairs",
    "eval_pairs",
    "store_batch_size_prompts",
    "outlier_factor",
    "n_ranks",
)


@dataclass
class SourceConfig:
    """One data set and its weight in the training text.

    Its rows are text, chats (a column of messages, each with role and content, or ShareGPT's from
    and value), token ids (decoded to text, which the other model needs), or contrastive (`prompt`,
    `completion_a` and `completion_b` as `sae-lens-dfc generate` writes them: both models read both
    answers).

    Raises:
        ValueError: The weight is not above 0.
    """

    dataset_path: str
    """Hub name, file (.txt, .jsonl, .csv, .parquet), folder written by save_to_disk, or
    cpython-docs."""
    weight: float = 1.0
    """Share of the pairs drawn from this source, relative to the other sources' weights."""
    text_column: str | None = None
    """Column to read; if unset, the first that exists of text, messages, input_ids, tokens,
    conversations and conversation, or both completions of contrastive rows."""
    dataset_name: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    streaming: bool = True
    """Read a hub data set as it downloads."""
    tokenizer: Literal["a", "b"] = "a"
    """Model whose token ids a pre-tokenized data set holds."""
    max_unreadable: float = 0.01
    """Largest share of unreadable documents to skip, such as chats that a chat template rejects; 1
    skips all of them."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"The weight of source {self.dataset_path!r} must be above 0, got {self.weight}."
            )


@dataclass
class DataConfig:
    """Two models and their text: the settings that training and caching share.

    Raises:
        ValueError: A number is out of its range; the message names it.
    """

    model_a: ModelConfig = field(default_factory=ModelConfig)
    """The first model; if its name is unset and the second model is an adapter, the adapter's base
    is used."""
    model_b: ModelConfig = field(default_factory=ModelConfig)
    """The second model."""

    dataset_path: str = "cpython-docs"
    """Hub name, file (.txt, .jsonl, .csv, .parquet), folder written by save_to_disk, or
    cpython-docs, which ships with Python."""
    dataset_name: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    text_column: str | None = None
    """Column that holds text, chat messages or token ids; if unset, the first common column name
    found."""
    streaming: bool = True
    """Read a hub data set as it downloads."""
    sources: list[SourceConfig] = field(default_factory=list, metadata={"cmd": False})
    """Several data sets with weights, instead of the one in dataset_path; only in a --config
    file."""
    eval_every_n_documents: int = 10
    """Hold out every n-th document for evaluation."""
    max_unique_pairs: int | None = None
    """Maximum number of distinct training pairs, repeated over several epochs if needed; if unset,
    the whole text."""
    eval_pairs: int = 20_000
    """Maximum number of held-out pairs to evaluate."""
    context_size: int = 128
    """Maximum tokens per context, in either model."""
    store_batch_size_prompts: int = 16
    """Contexts of context_size tokens per forward pass; more if they are shorter."""
    autocast_lm: bool = switch()
    """Run the models in bfloat16 where torch deems it safe."""
    compile_llm: bool = switch()
    """Compile the models' forward passes with torch.compile."""
    llm_compilation_mode: str | None = None
    """Mode of torch.compile for the models."""
    outlier_factor: float = 2.0
    """Drop a pair if either activation norm exceeds this multiple of its model's running median."""
    seed: int = 42
    """Seed of the initial weights and of the shuffle."""
    n_ranks: int = field(default=1, metadata={"cmd": False})
    """Number of ranks that share the text; torchrun sets it."""

    def __post_init__(self) -> None:
        require(self, POSITIVE)
        if self.eval_every_n_documents < 2:
            raise ValueError(
                f"eval_every_n_documents must be at least 2, got {self.eval_every_n_documents}: 1 would leave nothing to train on."
            )
        require(self, ("context_size",), "at least 2")
        require(self, ("n_ranks",), f"at most {MAX_RANKS}")
        check_seed(self.seed)

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The data sets to read: `sources`, or the one that the flat fields describe."""
        flat = SourceConfig(
            self.dataset_path,
            text_column=self.text_column,
            dataset_name=self.dataset_name,
            dataset_split=self.dataset_split,
            streaming=self.streaming,
        )
        return self.sources or [flat]


@dataclass(kw_only=True)
class CacheConfig(DataConfig):
    """Settings of `cache_activations`."""

    cache_path: str = "runs/cache"
    """Folder for the cache."""
    cache_dtype: str = "bfloat16"
    """Dtype of the cached rows: bfloat16, float16 or float32."""
    shard_rows: int = 16_384
    """Rows per shard file."""
    n_writers: int = 2
    """Threads that write shards while the models run."""
    save_origins: bool = switch()
    """Store each row's source, document, and token and position in each model: 48 bytes per row."""
    overwrite: bool = switch()
    """Replace an existing cache in the folder."""
    resume: bool = switch()
    """Resume an interrupted cache after its last complete shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("shard_rows", "n_writers"))
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume contradict each other. Choose one.")
