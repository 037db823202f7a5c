"""Defines the metadata of an activation cache: header, manifest and progress."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_dfc.core.atomic_write import atomic_file
from sae_lens_dfc.core.identity import deciding, first_difference, same_wherever
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.tensor_files import State, load_state, state_bytes
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.data.activations import StreamState
from sae_lens_dfc.data.cache.norms import NormStatistics
from sae_lens_dfc.data.contexts import PairCounts

MANIFEST_FILENAME = "manifest.json"
FORMAT = 1
ACTS = "acts"
"""Name of the activation tensor in a shard."""


@dataclass(frozen=True)
class Shard:
    """One file of cached rows."""

    file: str
    """File name in the cache's folder."""
    rows: int
    size: int
    """Size of the file, in bytes."""
    xxh3: str
    """128-bit XXH3 checksum of the file."""


@dataclass(frozen=True)
class CacheHeader:
    """Settings and fingerprints that determine a cache; caches with the same header hold the same
    rows."""

    models: dict[str, Any]
    """`ModelPair.describe()`, with the dtype that each model ran in."""
    configs: dict[str, Any]
    """The models' settings, not compared, because the models may have been moved."""
    data: dict[str, Any]
    """Settings of data sets, alignment and filters; the data sets' locations are not compared."""
    text: dict[str, Any]
    """Fingerprints of the text, see `PairedText.fingerprint`."""
    dtype: str
    """Dtype of the rows."""
    shard_rows: int
    """Rows per shard, except the last."""
    origins: bool
    """Whether each row's document, positions and tokens are stored."""

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first difference that makes another header, given as plain values, that of a
        different cache; None if there is none."""
        own = asdict(self)
        return first_difference(_decisive({n: other.get(n) for n in own}), _decisive(own))

    @property
    def d_a(self) -> int:
        return int(self.models["model_a"]["d_model"])

    @property
    def d_b(self) -> int:
        return int(self.models["model_b"]["d_model"])


def _decisive(header: Mapping[str, Any]) -> dict[str, Any]:
    data = header["data"]
    return {
        **header,
        "configs": None,
        "models": same_wherever(header["models"]),
        "data": deciding(data) if isinstance(data, Mapping) else data,
    }


@dataclass
class WriterProgress:
    """WriterProgress of one rank, in whole shards."""

    shards: list[Shard] = field(default_factory=list)
    after: StreamState | None = None
    """State to resume from; None at the beginning."""
    skip: int = 0
    """Number of rows after that state that the last shard already holds."""
    counts: PairCounts = field(default_factory=PairCounts)
    statistics: tuple[NormStatistics, NormStatistics] = field(
        default_factory=lambda: (NormStatistics(), NormStatistics())
    )
    """Norm statistics of model A and model B."""
    done: bool = False

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def save(self, path: Path, header: CacheHeader) -> None:
        """Write the progress atomically, replacing the previous file."""
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
        with atomic_file(path) as temporary:
            temporary.write_bytes(state_bytes(State(values, tensors)))

    @classmethod
    def load(cls, path: Path) -> tuple["WriterProgress", dict[str, Any]]:
        """Read the progress at `path` and the header that it was written with.

        Raises:
            ValueError: The file cannot be read.
        """
        try:
            values, tensors = load_state(path)
            a, b = (NormStatistics.of(tensors.pop(f"statistics_{model}")) for model in "ab")
            header, after, _ = (values.pop(name) for name in ("header", "after", "format"))
            if not isinstance(header, dict) or not isinstance(after, dict | None):
                raise ValueError("its header or its state has an unexpected type.")
            progress = from_plain(cls, values, "The progress")
            progress.after = None if after is None else StreamState(after, tensors)
            progress.statistics = (a, b)
            return progress, header
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged: {said_by(error)} Cache again with --overwrite."
            ) from error


def progress_path(folder: Path, rank: int) -> Path:
    """Path of a rank's progress file."""
    return folder / f"progress-{rank:05d}.safetensors"


def write_manifest(
    folder: Path, header: CacheHeader, parts: Sequence[WriterProgress]
) -> dict[str, Any]:
    """Write the manifest, which marks the cache as complete and describes it."""
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
                "outlier_share": getattr(counts, f"outlier_{model}")
                / max(1, counts.pairs + counts.outlier),
            }
            for model, s in zip("ab", statistics, strict=True)
        },
        "places": [None if p.after is None else p.after.values.get("text") for p in parts],
        "shards": [asdict(shard) for part in parts for shard in part.shards],
    }
    with atomic_file(folder / MANIFEST_FILENAME) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
