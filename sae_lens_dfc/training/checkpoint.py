"""Where a training stands, all of it, on disk: written whole or not at all, and read without running anything."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError
from torch import Tensor

from sae_lens_dfc import ranks
from sae_lens_dfc.activations import Bookmark
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.files import alike, read_object
from sae_lens_dfc.output import os_errors
from sae_lens_dfc.state import State, checksum, load_state, save_state

TRAINER_FILENAME = "trainer_state.safetensors"
SUMS_FILENAME = "checksums.json"
_REMOVE = "Remove its folder to resume from the one before."
_NEW, _OLD = ".new", ".old.new"
KEPT = 2
"""Checkpoints kept: if the machine dies while one is moved away, there is another."""

COUNTERS = ("n_training_samples", "n_frac_active_samples", "started_fine_tuning")
TENSORS = ("act_freq_scores", "n_forward_passes_since_fired")


# --- SAELens' trainer ---


def trainer_state(trainer: SAETrainer[Any, Any], n_training_steps: int) -> State:
    """Optimizer, schedules and counters of SAELens' trainer, which itself pickles them.

    Args:
        trainer: The trainer.
        n_training_steps: Steps that it has made; it counts the last one after its own checkpoints.
    """
    optimizer = trainer.optimizer.state_dict()
    values = {
        **{name: getattr(trainer, name) for name in COUNTERS},
        "n_training_steps": n_training_steps,
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {n: s.state_dict() for n, s in trainer.coefficient_schedulers.items()},
    }
    tensors = {name: getattr(trainer, name) for name in TENSORS}
    for parameter, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": x for name, x in moments.items()}
    return State(values, tensors)


def load_trainer_state(trainer: SAETrainer[Any, Any], state: State) -> None:
    """Take over what `trainer_state` gave.

    Raises:
        ValueError: It is of another trainer, or was altered.
    """
    values, tensors = state
    _check_trainer_state(trainer, state)
    for name in (*COUNTERS, "n_training_steps"):
        setattr(trainer, name, values[name])
    for name in TENSORS:
        setattr(trainer, name, tensors[name].to(trainer.cfg.device))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if name.startswith("optimizer."):
            _, parameter, moment = name.split(".")
            moments.setdefault(int(parameter), {})[moment] = x
    # Whether Adam is fused is this machine's matter, not the checkpoint's.
    for group, own in zip(values["param_groups"], trainer.optimizer.param_groups, strict=True):
        group["fused"] = own["fused"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": values["param_groups"]})
    trainer.lr_scheduler.load_state_dict(values["lr_scheduler"])
    for name, scheduler in values["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(scheduler)


def _check_trainer_state(trainer: SAETrainer[Any, Any], state: State) -> None:
    """Refuse a state that is not built like the trainer's own: torch's `load_state_dict` takes over what it is given."""
    own, own_tensors = trainer_state(trainer, trainer.n_training_steps)
    for group in (*own["param_groups"], *state.values["param_groups"]):
        group["fused"] = None
    counters = [state.values[name] for name in (*COUNTERS, "n_training_steps")]
    are_counts = all(isinstance(n, int) and n >= 0 for n in counters)
    if not are_counts or not alike(state.values, own):
        raise ValueError("its counters, schedules or optimizer are not built like this training's.")
    shapes = {name: x.shape for name, x in own_tensors.items() if name in TENSORS}
    group = trainer.optimizer.param_groups[0]["params"]
    for name in state.tensors.keys() - shapes.keys():
        _, parameter, moment = name.split(".")
        shapes[name] = torch.Size() if moment == "step" else group[int(parameter)].shape
    for name, shape in shapes.items():
        if state.tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(state.tensors[name].shape)}, not {tuple(shape)}."
            )


# --- a whole checkpoint ---


def save_checkpoint(
    folder: Path,
    trainers: Mapping[str, SAETrainer[Any, Any]],
    n_training_steps: int,
    data: Bookmark | None,
    values: Mapping[str, Any],
) -> None:
    """Write a checkpoint and remove those before the last two.

    Each crosscoder is in a folder of its own, in SAELens' form, with its trainer's state beside it. What
    differs between processes, each writes to a file of its own.

    Args:
        folder: The checkpoint, a new folder named by the number of samples.
        trainers: SAELens' trainers by name of crosscoder, between two steps.
        n_training_steps: Steps that they have made.
        data: Where the batches stand.
        values: What else is to be had again.
    """
    with _made_by_all(folder) as temporary:
        if ranks.rank() == 0:
            for name, trainer in trainers.items():
                trainer.sae.save_model(temporary / name)
                save_state(
                    temporary / name / TRAINER_FILENAME, trainer_state(trainer, n_training_steps)
                )
        own = _own_state(trainers, data)
        save_state(temporary / _own_filename(), State({**own.values, **values}, own.tensors))
    remove_checkpoints(checkpoints(folder.parent)[:-KEPT])


def load_checkpoint(folder: Path, trainers: Mapping[str, SAETrainer[Any, Any]]) -> None:
    """Put trainers, crosscoders and random numbers where a checkpoint says.

    Raises:
        ValueError: A file is missing or damaged.
    """
    with _readable(folder):
        for name, trainer in trainers.items():
            state = _load(folder / name / TRAINER_FILENAME)
            trainer.sae.load_weights_from_checkpoint(folder / name)
            load_trainer_state(trainer, state)
        _, tensors = _load(folder / _own_filename())
        for name, trainer in trainers.items():
            crosscoder: TrainingCrosscoder[Any] = trainer.sae
            crosscoder.load_training_state(_under(f"crosscoder.{name}.", tensors))
        torch.set_rng_state(tensors["random.cpu"])
        on_gpus = [*_under("random.cuda.", tensors).values()]
        if len(on_gpus) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(on_gpus)


def load_place(folder: Path) -> tuple[Bookmark | None, dict[str, Any]]:
    """Where a checkpoint's batches stand on this rank, and the values it was saved with.

    Raises:
        ValueError: A file of the checkpoint is missing or damaged.
    """
    check_files(folder)
    with _readable(folder):
        values, tensors = _load(folder / _own_filename())
        data = values.pop("data")
        if not isinstance(data, dict | None):
            raise TypeError(f"its place is {data!r:.80}")
        return None if data is None else Bookmark(data, _under("data.", tensors)), values


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def remove_checkpoints(folders: Sequence[Path]) -> None:
    """Remove these, on one rank for all."""
    ranks.wait()
    if ranks.rank() == 0:
        for folder in folders:
            shutil.rmtree(folder)


def _own_state(trainers: Mapping[str, SAETrainer[Any, Any]], data: Bookmark | None) -> State:
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"random.cuda.{i:03d}": state for i, state in enumerate(states)}
    for name, trainer in trainers.items():
        crosscoder: TrainingCrosscoder[Any] = trainer.sae
        for key, x in crosscoder.training_state().items():
            tensors[f"crosscoder.{name}.{key}"] = x
    if data is not None:
        tensors |= {f"data.{name}": x for name, x in data.tensors.items()}
    return State({"data": None if data is None else data.values}, tensors)


def _load(path: Path) -> State:
    try:
        return load_state(path)
    except ValueError as error:
        raise ValueError(f"Checkpoint {path} cannot be read: {error} {_REMOVE}") from error


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What torch and SAELens raise for a state that is not theirs, as an error that says what to do."""
    try:
        yield
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        if said.endswith(_REMOVE):
            raise
        raise ValueError(f"Checkpoint {folder} cannot be read: {said} {_REMOVE}") from error


def _own_filename() -> str:
    return f"rank-{ranks.rank():05d}.safetensors"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


@contextmanager
def _made_by_all(folder: Path) -> Iterator[Path]:
    """A temporary folder for all ranks to write into, which takes its name when all have."""
    temporary = folder.with_name(f".{folder.name}{_NEW}")
    if ranks.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    try:
        with os_errors():
            yield temporary
        ranks.wait()
        if ranks.rank() == 0:
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            sums = {str(path.relative_to(temporary)): checksum(path) for path in files}
            (temporary / SUMS_FILENAME).write_text(json.dumps(sums, indent=1))
            _put_in_place(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"Could not write checkpoint {folder}: {error} Earlier ones are kept: make room and go on with --resume."
        ) from error
    ranks.wait()


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename it; the checkpoint of the same step that a resumed training began with stays until then."""
    superseded = folder.with_name(f".{folder.name}{_OLD}")
    if folder.exists():
        folder.rename(superseded)
    temporary.rename(folder)
    shutil.rmtree(superseded, ignore_errors=True)


def tidy_checkpoints(path: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing, in a folder that is the caller's alone."""
    for left in path.glob(f".*{_NEW}"):
        kept = path / left.name.removeprefix(".").removesuffix(_OLD)
        if left.name.endswith(_OLD) and not kept.exists():
            left.rename(kept)
        else:
            shutil.rmtree(left, ignore_errors=True)


def check_files(folder: Path) -> None:
    """Compare all files of a checkpoint with the checksums it was written with; no file outside it is opened.

    Raises:
        ValueError: One is damaged, missing, or was not there when it was written.
    """
    try:
        sums = read_object(folder / SUMS_FILENAME)
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        there = {str(path.relative_to(folder)): path for path in files if path.name[0] != "."}
        del there[SUMS_FILENAME]
        links = [name for name, path in there.items() if path.is_symlink()]
        if links or sums.keys() != there.keys():
            odd = sorted(links or sums.keys() ^ there.keys())
            raise ValueError(f"{odd[0]!r:.80} is a link, missing, or not of it.")
        damaged = [name for name, path in there.items() if checksum(path) != sums[name]]
    except (OSError, ValueError) as error:
        raise ValueError(f"Checkpoint {folder} cannot be read: {error} {_REMOVE}") from error
    if damaged:
        raise ValueError(f"Checkpoint {folder} is damaged: {', '.join(damaged)}. {_REMOVE}")
