"""Finds and checks the files of an untrusted data set before they are read."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from sae_lens_dfc.core.parsing import MAX_YAML, parse_yaml, read_object, read_text, read_yaml
from sae_lens_dfc.core.tensor_files import file_in
from sae_lens_dfc.core.untrusted.arrow import check_arrow
from sae_lens_dfc.core.untrusted.parquet import check_parquet

MAX_CARD = 1_000_000
"""Maximum size of a data set's README.md, in bytes."""

TABLE_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# For folders; if several kinds are equally frequent, the last one in this order is read.
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
FILES_NAMED = 3
"""Maximum number of files named in a message."""
READER_OPTIONS = {"sep", "delimiter", "field"}
"""Settings of a configuration that control how its files are read."""


class OtherVersion(ValueError):
    """The installed version of a library lacks a function that is needed."""


def of_datasets(module: str, name: str) -> Any:
    """Look up an undocumented name of `datasets`, only when it is needed.

    Args:
        module: Module of `datasets` that defines it.
        name: Its name in that module.

    Raises:
        OtherVersion: This version of `datasets` has no such name.

    >>> callable(of_datasets("data_files", "get_data_patterns"))
    True
    """
    try:
        return getattr(import_module(f"datasets.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise OtherVersion(
            f"Version {datasets.__version__} of datasets has no {module}.{name}, which is needed to check a data set before it is read. "
            "Install a version that has it; CONTRIBUTING.md says how to install those that are tested."
        ) from error


class DatasetFiles(NamedTuple):
    """The files of a folder, and how to read them."""

    loader: str
    """Name of the format in datasets."""
    files: dict[str, list[str]]
    """Files of each split, as patterns that match exactly one file each."""
    options: dict[str, str]
    note: str = ""
    """A sentence on which data files are read and which are skipped; empty if none are skipped."""


def files_in(folder: Path, config: str | None = None) -> DatasetFiles:
    """List the data files of a folder by the rules of datasets, but refuse files outside it, which
    datasets would read if a README.md names them.

    Args:
        folder: A folder of tables or text, with or without a README.md that defines configurations.
        config: The name of the configuration.

    Raises:
        ValueError: A name or link leads out of the folder, a file expands to a far larger size, or
            there is nothing to read.
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
    if suffix == ".tsv":
        options = {"sep": "\t", **options}
    files: dict[str, list[str]] = {}
    read: list[Path] = []
    for split, paths in found.items():
        for path in paths:
            if _kind(_suffix(path)) == _kind(suffix):
                check_table(path)
                files.setdefault(split, []).append(pattern_of(path))
                read.append(path)
    is_parted = any(_configurations(folder))
    others = [path for paths in found.values() for path in paths] if is_parted else _data(folder)
    note = _note(folder, read, sorted({*others} - {*read}))
    return DatasetFiles(FOLDER_LOADERS[suffix], files, options, note)


def _kind(suffix: str) -> str:
    """The kind of a file; files of the same kind can be read together."""
    # .tsv has another column separator than .csv, although datasets has one loader for both.
    return suffix if suffix == ".tsv" else FOLDER_LOADERS.get(suffix, "")


def _data(folder: Path) -> list[Path]:
    """All data files in a folder and its subfolders, except hidden ones."""
    inside = (path for path in folder.resolve().rglob("*") if _suffix(path) and path.is_file())
    hidden = ("_", ".")
    return [
        path
        for path in inside
        if path.name not in NOT_DATA
        and not any(x.startswith(hidden) for x in path.relative_to(folder.resolve()).parts)
    ]


def _note(folder: Path, read: list[Path], left_out: list[Path]) -> str:
    if not left_out:
        return ""
    return (
        f"In folder {str(folder)!r:.200}, {len(read)} of {len(read) + len(left_out)} files are read ({_names(read)}) and "
        f"{len(left_out)} left out ({_names(left_out)}): one kind of file is read, that of most files, and where some are "
        "named for a split, such as train, those alone."
    )


def _names(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:FILES_NAMED])
    return names + (f" and {len(paths) - FILES_NAMED} more" if len(paths) > FILES_NAMED else "")


def pattern_of(path: Path) -> str:
    """A datasets pattern that matches only this path.

    Raises:
        ValueError: No pattern can match it.

    >>> pattern_of(Path("/data/[1].jsonl"))
    '/data/[[]1].jsonl'
    """
    if "::" in str(path):
        raise ValueError(f"{str(path)!r:.200} has '::' in its name. Give it another.")
    return escape(str(path))


def _check_links(folder: Path) -> None:
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # the hub's cache, where each file is a link
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
    """The patterns of each split, and the options of the configuration."""
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
        if name not in OF_A_CONFIGURATION | READER_OPTIONS or not isinstance(
            value, str | list | dict | bool
        ):
            raise ValueError(
                f"its README.md sets {name!r:.80} to {value!r:.80}, which is not followed here."
            )
    inside = _relative(values.get("data_dir", "."))
    if "data_files" not in values:
        return _usual_patterns(folder, inside), _options(values)
    named = of_datasets("data_files", "sanitize_patterns")(values["data_files"])
    own = {split: [_relative(one) for one in several] for split, several in named.items()}
    return _beneath(inside, own), _options(values)


def _usual_patterns(folder: Path, inside: str = ".") -> dict[str, list[str]]:
    patterns = of_datasets("data_files", "get_data_patterns")(str((folder / inside).resolve()))
    return _beneath(inside, patterns)


def _beneath(inside: str, patterns: Mapping[Any, list[str]]) -> dict[str, list[str]]:
    return {
        str(split): [str(Path(inside, one)) for one in several]
        for split, several in patterns.items()
    }


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(values[name]) for name in READER_OPTIONS & set(values)}


def _configurations(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in _card(folder).get("configs") or []:
        if not isinstance(one, dict):
            raise ValueError(f"its README.md has {one!r:.80} as a configuration.")
        yield str(one.get("config_name", "default")), one


def _card(folder: Path) -> dict[str, Any]:
    """The YAML front matter of README.md, and all of .huggingface.yaml."""
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
    # Some versions of huggingface_hub ignore keys that are not strings, and others fail on them.
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
    resolve_pattern = of_datasets("data_files", "resolve_pattern")
    try:
        paths = [Path(one) for one in resolve_pattern(pattern, str(folder.resolve()))]
    except FileNotFoundError:
        return []
    if outside := [path for path in paths if not path.is_relative_to(folder.resolve())]:
        raise ValueError(f"{pattern!r:.200} leads out of it, to {str(outside[0])!r:.200}.")
    return [path for path in paths if path.name not in NOT_DATA]


def _suffix(path: Path) -> str:
    """The last known suffix of a file; compressed files have another one after it."""
    known = [one.lower() for one in path.suffixes if one.lower() in FOLDER_LOADERS]
    return known[-1] if known else ""


def check_table(path: Path) -> None:
    """Refuse a small file that expands to a very large one.

    Raises:
        ValueError: It does, or is compressed, which datasets would unpack without a limit on its
            size.
    """
    if path.suffix.lower() == ".parquet":
        check_parquet(path)
    elif path.suffix.lower() == ".arrow":
        check_arrow(path)
    elif kind := of_datasets("utils.extract", "Extractor").infer_extractor_format(path):
        raise ValueError(f"it is compressed ({kind}). Unpack it first.")


def check_saved(folder: Path) -> None:
    """Refuse a saved data set whose description names files outside its folder, or files that
    expand to far larger ones.

    Raises:
        ValueError: It does, or the description is invalid.
    """
    read_object(folder / "dataset_info.json")
    files = read_object(folder / "state.json").get("_data_files")
    if not isinstance(files, list):
        raise ValueError(f"state.json has {files!r:.80} as its files.")
    for file in files:
        check_arrow(file_in(folder, str(file.get("filename")) if isinstance(file, dict) else ""))
