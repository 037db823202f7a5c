"""Checks whether a data set is a run's own text, even if moved, by fingerprints of its training
rows."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.data.config import CPYTHON_DOCS, SourceConfig
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


class OwnSource(NamedTuple):
    """One of a run's data sets at its current location."""

    number: int
    """Index of the data set, from 0."""
    source: SourceConfig


def text_signs(run: str) -> dict[str, Any]:
    """Fingerprints of the text that a run was trained on or that its cache was built from; empty if
    the run stores none.

    Args:
        run: Folder written by `train` or `demo`.

    Raises:
        ValueError: The folder holds no crosscoder.
    """
    metadata = read_object(Path(run) / SAE_CFG_FILENAME).get("metadata")
    made_of = metadata.get("made_of") if isinstance(metadata, Mapping) else None
    if not isinstance(made_of, Mapping):
        return {}
    signs = made_of.get("text") or made_of.get("text_of_cache")
    return dict(signs) if isinstance(signs, Mapping) else {}


def own_source(
    signs: Mapping[str, Any], cfg: CrosscoderRunnerConfig, dataset: str
) -> OwnSource | None:
    """Find a data set among those a run was trained on; none if its rows match none of them.

    Args:
        signs: The run's fingerprints, see `text_signs`.
        cfg: The run's settings.
        dataset: Current location of the data set.
    """
    for number, source in enumerate(cfg.all_sources):
        sign = signs.get(f"source_{number}")
        if isinstance(sign, Mapping):
            for moved in _at_new_place(source, dataset):
                if _has_sign(moved, sign):
                    return OwnSource(number, moved)
    return None


def with_sources(
    cfg: CrosscoderRunnerConfig, sources: list[SourceConfig]
) -> CrosscoderRunnerConfig:
    """The settings with the run's data sets replaced.

    >>> from sae_lens_dfc import BatchTopKTrainingCrosscoderConfig
    >>> cfg = CrosscoderRunnerConfig(sae=BatchTopKTrainingCrosscoderConfig(d_sae=64, k=4))
    >>> with_sources(cfg, [SourceConfig("moved.jsonl")]).dataset_path
    'moved.jsonl'
    """
    if len(sources) > 1:
        return replace(cfg, sources=sources)
    flat = {
        f.name: getattr(sources[0], f.name) for f in fields(SourceConfig) if hasattr(cfg, f.name)
    }
    # A single data set may have settings that the flat fields cannot hold.
    return replace(cfg, **flat, sources=sources if cfg.sources else [])


def _at_new_place(source: SourceConfig, dataset: str) -> Iterator[SourceConfig]:
    yield replace(source, dataset_path=dataset)
    # Another format has other parts: a split of a hub data set is a separate file on disk.
    usual = SourceConfig(dataset)
    there = {n: getattr(usual, n) for n in ("dataset_name", "dataset_split", "streaming")}
    if there != {name: getattr(source, name) for name in there}:
        yield replace(source, dataset_path=dataset, **there)
    if source.text_column is not None:
        yield replace(source, dataset_path=dataset, **there, text_column=None)


def _has_sign(source: SourceConfig, sign: Mapping[str, Any]) -> bool:
    is_here = source.dataset_path == CPYTHON_DOCS or Path(source.dataset_path).exists()
    if not is_here and "hub" in sign and sign["hub"] != source.dataset_path:
        return False  # a stream from the hub is identified only by its name
    try:
        opened = Source.open(source)
        rows = opened.rows.dataset
        if isinstance(rows, Dataset) and sign.get("rows") != len(rows):
            return False
        return opened.fingerprint == sign
    except ValueError:
        return False  # reading it as other text raises the error again
