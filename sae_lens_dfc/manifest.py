"""What a cache of activations says of itself: what made it, what is in it, and how far it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_dfc.activations import Bookmark
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.files import from_plain
from sae_lens_dfc.norms import NormStatistics
from sae_lens_dfc.output import replaced
from sae_lens_dfc.state import State, load_state, state_bytes

MANIFEST_FILENAME = "manifest.json"
FORMAT = 1
ACTS = "acts"
"""Name of the rows in a shard."""


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    """Its name in the cache's folder."""
    rows: int
    size: int
    """Bytes."""
    xxh3: str
    """XXH3 checksum, 128 bits, of the whole file."""


@dataclass(frozen=True)
class CacheHeader:
    """What made a cache; two with the same header hold the same rows."""

    models: dict[str, Any]
    """`ModelPair.describe()`, with the number format each model ran in."""
    configs: dict[str, Any]
    """Where the models were; they may have moved since."""
    data: dict[str, Any]
    """Data sets, alignment and filter settings."""
    text: list[str]
    """A sign of each data set's rows, see `Rows.fingerprint`."""
    dtype: str
    """Number format of the rows."""
    shard_rows: int
    """Rows in each shard but the last."""
    origins: bool
    """Whether each row comes with its document, positions and tokens."""

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first thing in which another header, as plain values, is of another cache; none when it is not."""
        own = json.loads(json.dumps({**asdict(self), "configs": None}))
        return first_difference({name: other.get(name) for name in own} | {"configs": None}, own)

    @property
    def d_a(self) -> int:
        return int(self.models["model_a"]["d_model"])

    @property
    def d_b(self) -> int:
        return int(self.models["model_b"]["d_model"])


@dataclass
class Progress:
    """How far one process is: whole shards only."""

    shards: list[Shard] = field(default_factory=list)
    after: Bookmark | None = None
    """The rows to go on with, none at the beginning."""
    skip: int = 0
    """How many of those rows are in the last shard already."""
    counts: PairCounts = field(default_factory=PairCounts)
    statistics: tuple[NormStatistics, NormStatistics] = field(
        default_factory=lambda: (NormStatistics(), NormStatistics())
    )
    """Norms of model A and model B."""
    done: bool = False

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def save(self, path: Path, header: CacheHeader) -> None:
        """Write it in place of what was there, at once."""
        values = {
            "format": FORMAT,
            "header": asdict(header),
            "shards": [asdict(shard) for shard in self.shards],
            "after": None if self.after is None else self.after.values,
            "skip": self.skip,
            "counts": self.counts.to_dict(),
            "done": self.done,
        }
        tensors = {} if self.after is None else dict(self.after.tensors)
        tensors |= {
            f"statistics_{m}": s.state() for m, s in zip("ab", self.statistics, strict=True)
        }
        with replaced(path) as temporary:
            temporary.write_bytes(state_bytes(State(values, tensors)))

    @classmethod
    def load(cls, path: Path) -> tuple["Progress", dict[str, Any]]:
        """The progress at `path`, and the header it was made with.

        Raises:
            ValueError: The file cannot be read.
        """
        try:
            values, tensors = load_state(path)
            a, b = (NormStatistics.of(tensors.pop(f"statistics_{model}")) for model in "ab")
            counts, after = PairCounts(), values["after"]
            counts.load(values["counts"])
            if not isinstance(values["header"], dict) or not isinstance(after, dict | None):
                raise ValueError("its header or its place is of another type.")
            parts = {
                "shards": [from_plain(Shard, shard, "A shard") for shard in values["shards"]],
                "after": None if after is None else Bookmark(after, tensors),
                "skip": values["skip"],
                "counts": counts,
                "statistics": (a, b),
                "done": values["done"],
            }
            return from_plain(cls, parts, "The progress"), values["header"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error} Cache again with --overwrite.") from error


def progress_path(folder: Path, rank: int) -> Path:
    """Where a process keeps how far it is."""
    return folder / f"progress-{rank:05d}.safetensors"


def write_manifest(folder: Path, header: CacheHeader, parts: Sequence[Progress]) -> dict[str, Any]:
    """Say that the cache is complete, and what is in it."""
    counts, statistics = PairCounts(), (NormStatistics(), NormStatistics())
    for part in parts:
        counts.add(part.counts)
        for whole, other in zip(statistics, part.statistics, strict=True):
            whole.add(other)
    manifest = {
        "format": FORMAT,
        "rows": sum(part.rows for part in parts),
        "d_a": header.d_a,
        "d_b": header.d_b,
        **asdict(header),
        "counts": counts.to_dict(),
        "norms": {
            model: {
                "mean": s.mean,
                "std": s.std,
                "median": s.median,
                "outlier_share": getattr(counts, f"outlier_{model}")
                / max(1, counts.pairs + counts.outlier),
            }
            for model, s in zip("ab", statistics, strict=True)
        },
        "places": [None if p.after is None else p.after.values.get("text") for p in parts],
        "shards": [asdict(shard) for part in parts for shard in part.shards],
    }
    with replaced(folder / MANIFEST_FILENAME) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> str | None:
    """The first setting in which two nested mappings differ, with both values; none when they are equal.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    'a.b was 1 and is 2'
    """
    for key in [*one, *(key for key in other if key not in one)]:
        was, now = one.get(key), other.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found = first_difference(was, now, f"{prefix}{key}.")
            if found:
                return found
        elif was != now:
            return f"{prefix}{key} was {was!r} and is {now!r}"
    return None
