"""The files of a data set that somebody else may have made: found, and looked at, before anybody reads them."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns
from datasets.utils.extract import Extractor

from sae_lens_dfc.arrow_file import check_arrow
from sae_lens_dfc.files import MAX_YAML, file_in, parse_yaml, read_object, read_text, read_yaml
from sae_lens_dfc.parquet_file import check_parquet

MAX_CARD = 1_000_000
"""Bytes of a data set's README.md."""

TABLE_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Those of a folder besides, last the one that wins where there are as many of several.
FOLDER_LOADERS = {
    ".txt": "text",
    ".tsv": "csv",
    ".csv": "csv",
    ".ndjson": "json",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    ".parquet": "parquet",
}
NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
OF_A_CONFIGURATION = {"config_name", "data_files", "data_dir", "default", "description", "version"}
OPTIONS = {"sep", "delimiter", "field"}
"""Settings of a configuration that say how its files are to be read."""


class Listing(NamedTuple):
    """The files of a folder, and how to read them."""

    loader: str
    """As datasets calls the format."""
    files: dict[str, list[str]]
    """Of each split, as patterns that fit them alone."""
    options: dict[str, str]


def files_in(folder: Path, config: str | None = None) -> Listing:
    """The data files of a folder, by the rules of datasets, but none that lies elsewhere: datasets goes where a README.md says.

    Args:
        folder: A folder of tables or text, with or without a README.md that parts them in configurations.
        config: The name of the configuration.

    Raises:
        ValueError: A name or link leads out of the folder, a file stands for a far larger one, or there is nothing to read.
    """
    _check_links(folder)
    patterns, options = _patterns(folder, config)
    found = {
        split: [path for one in several for path in _found(folder, one)]
        for split, several in patterns.items()
    }
    suffixes = Counter(
        suffix for paths in found.values() for path in paths if (suffix := _suffix(path))
    )
    if not suffixes:
        raise ValueError(f"it holds no file that ends in {', '.join(FOLDER_LOADERS)}.")
    order = list(FOLDER_LOADERS)
    suffix = max(suffixes, key=lambda one: (suffixes[one], order.index(one)))
    loader = FOLDER_LOADERS[suffix]
    if suffix == ".tsv":
        options = {"sep": "\t", **options}
    files: dict[str, list[str]] = {}
    for split, paths in found.items():
        for path in paths:
            if FOLDER_LOADERS.get(_suffix(path)) == loader:
                check_table(path)
                files.setdefault(split, []).append(pattern_of(path))
    return Listing(loader, files, options)


def pattern_of(path: Path) -> str:
    """The path as a pattern for datasets that fits it alone.

    Raises:
        ValueError: There is none.

    >>> pattern_of(Path("/data/[1].jsonl"))
    '/data/[[]1].jsonl'
    """
    if "::" in str(path):
        raise ValueError(f"{str(path)!r:.200} has '::' in its name. Give it another.")
    return escape(str(path))


def _check_links(folder: Path) -> None:
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # of the hub's cache, where each file is a link
        homes.append(homes[0].parent.parent / "blobs")
    for inside, folders, names in os.walk(folder):
        for path in (Path(inside, name) for name in [*folders, *names]):
            if path.is_symlink() and (
                path.is_dir() or not any(path.resolve().is_relative_to(home) for home in homes)
            ):
                raise ValueError(
                    f"{str(path)!r:.200} is a link that leads elsewhere. Put what it leads to in its place."
                )


def _patterns(folder: Path, config: str | None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Of each split, and the options of its configuration."""
    configs = dict(_configurations(folder))
    if not configs:
        if config not in (None, "default"):
            raise ValueError(f"it has no configuration {config!r:.80}; its README.md names none.")
        return _usual_patterns(folder), {}
    chosen = [config] if config else [name for name, one in configs.items() if one.get("default")]
    chosen = chosen or (list(configs) if len(configs) == 1 else ["default"])
    if chosen[0] not in configs:
        raise ValueError(
            f"its configurations are {list(configs)!r:.300}. Name one as dataset_name."
        )
    values = configs[chosen[0]]
    for name, value in values.items():
        if name not in OF_A_CONFIGURATION | OPTIONS or not isinstance(
            value, str | list | dict | bool
        ):
            raise ValueError(
                f"its README.md sets {name!r:.80} to {value!r:.80}, which is not followed here."
            )
    inside = _relative(values.get("data_dir", "."))
    if "data_files" not in values:
        return _usual_patterns(folder, inside), _options(values)
    named = sanitize_patterns(values["data_files"])
    own = {split: [_relative(one) for one in several] for split, several in named.items()}
    return _beneath(inside, own), _options(values)


def _usual_patterns(folder: Path, inside: str = ".") -> dict[str, list[str]]:
    return _beneath(inside, get_data_patterns(str((folder / inside).resolve())))


def _beneath(inside: str, patterns: Mapping[Any, list[str]]) -> dict[str, list[str]]:
    return {
        str(split): [str(Path(inside, one)) for one in several]
        for split, several in patterns.items()
    }


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(values[name]) for name in OPTIONS & set(values)}


def _configurations(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in _card(folder).get("configs") or []:
        if not isinstance(one, dict):
            raise ValueError(f"its README.md has {one!r:.80} as a configuration.")
        yield str(one.get("config_name", "default")), one


def _card(folder: Path) -> dict[str, Any]:
    """What README.md says between its two first lines of dashes, and .huggingface.yaml in all."""
    values: Any = {}
    if (folder / "README.md").exists():
        text = read_text(folder / "README.md", MAX_CARD)
        first, *lines = text.lstrip("\ufeff").lstrip().splitlines() or [""]
        if first.rstrip() == "---" and "---" in lines:
            front = "\n".join(lines[: lines.index("---")])
            if len(front) > MAX_YAML:
                raise ValueError(f"its README.md begins with {len(front):,} characters of YAML.")
            values = parse_yaml(front) or {}
    if (folder / ".huggingface.yaml").exists():
        values = values | (read_yaml(folder / ".huggingface.yaml") or {})
    # Some versions of the hub's library would pass over names that are none, others fail on them.
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError("its README.md does not begin with a mapping of names.")
    return values


def _relative(pattern: Any) -> str:
    if (
        not isinstance(pattern, str)
        or ":" in pattern
        or Path(pattern).is_absolute()
        or ".." in Path(pattern).parts
    ):
        raise ValueError(
            f"its README.md names {pattern!r:.200} as its files, which leads elsewhere."
        )
    return pattern


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        paths = [Path(one) for one in resolve_pattern(pattern, str(folder.resolve()))]
    except FileNotFoundError:
        return []
    if outside := [path for path in paths if not path.is_relative_to(folder.resolve())]:
        raise ValueError(f"{pattern!r:.200} leads out of it, to {str(outside[0])!r:.200}.")
    return [path for path in paths if path.name not in NOT_DATA]


def _suffix(path: Path) -> str:
    """The last ending that says what is in a file: compressed ones have another after it."""
    known = [one.lower() for one in path.suffixes if one.lower() in FOLDER_LOADERS]
    return known[-1] if known else ""


def check_table(path: Path) -> None:
    """Refuse a file that is small and stands for a very large one.

    Raises:
        ValueError: It is compressed, which datasets would unpack without asking how large that makes it.
    """
    if path.suffix.lower() == ".parquet":
        check_parquet(path)
    elif path.suffix.lower() == ".arrow":
        check_arrow(path)
    elif kind := Extractor.infer_extractor_format(path):
        raise ValueError(f"it is compressed ({kind}). Unpack it first.")


def check_saved(folder: Path) -> None:
    """Refuse a data set whose description names files outside its folder, or files that stand for far larger ones.

    Raises:
        ValueError: It does, or is not a description.
    """
    read_object(folder / "dataset_info.json")
    files = read_object(folder / "state.json").get("_data_files")
    if not isinstance(files, list):
        raise ValueError(f"state.json has {files!r:.80} as its files.")
    for file in files:
        check_arrow(file_in(folder, str(file.get("filename")) if isinstance(file, dict) else ""))
