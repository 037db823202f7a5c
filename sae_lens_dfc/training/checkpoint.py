"""Saves and restores the complete training state: checkpoints are written atomically and loaded
without executing code."""

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

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.atomic_write import os_errors, with_usual_modes
from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.schema import same_structure
from sae_lens_dfc.core.tensor_files import State, checksum, load_state, load_values, save_state
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.data.activations import StreamState

TRAINER_FILENAME = "trainer_state.safetensors"
SUMS_FILENAME = "checksums.json"
_REMOVE = "Remove its folder to resume from the one before."
_NEW, _OLD = ".new", ".old.new"
KEPT = 2
"""Number of checkpoints kept: if the machine fails while one is replaced, the other remains."""

COUNTERS = ("n_training_samples", "n_frac_active_samples", "started_fine_tuning")
TENSORS = ("act_freq_scores", "n_forward_passes_since_fired")


# --- SAELens' trainer ---


def trainer_state(trainer: SAETrainer[Any, Any], n_training_steps: int) -> State:
    """State of SAELens' trainer (optimizer, schedulers and counters) as plain values and tensors;
    SAELens pickles it.

    Args:
        trainer: The trainer.
        n_training_steps: Completed steps; the trainer's own counter lags by one during a
            checkpoint.
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
    """Restore the output of `trainer_state`.

    Raises:
        ValueError: The state belongs to another trainer or was altered.
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
    # Whether Adam is fused depends on this machine, not on the checkpoint.
    for group, own in zip(values["param_groups"], trainer.optimizer.param_groups, strict=True):
        group["fused"] = own["fused"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": values["param_groups"]})
    trainer.lr_scheduler.load_state_dict(values["lr_scheduler"])
    for name, scheduler in values["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(scheduler)


def _check_trainer_state(trainer: SAETrainer[Any, Any], state: State) -> None:
    """Check that a state has the structure of the trainer's own, since torch's `load_state_dict`
    accepts anything."""
    own, own_tensors = trainer_state(trainer, trainer.n_training_steps)
    for group in (*own["param_groups"], *state.values["param_groups"]):
        group["fused"] = None
    counters = [state.values[name] for name in (*COUNTERS, "n_training_steps")]
    are_counts = all(isinstance(n, int) and n >= 0 for n in counters)
    if not are_counts or not same_structure(state.values, own):
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
    data: StreamState | None,
    values: Mapping[str, Any],
) -> None:
    """Write a checkpoint and remove all but the last two.

    Each crosscoder has its own folder, in SAELens' format, with its trainer's state. Each rank
    writes its own state to its own file.

    Args:
        folder: Folder to create, named by the number of samples.
        trainers: SAELens' trainers by name of crosscoder, between two steps.
        n_training_steps: Completed steps.
        data: State of the data stream.
        values: Further values to store.
    """
    with _made_by_all(folder) as temporary:
        if distributed.rank() == 0:
            for name, trainer in trainers.items():
                trainer.sae.save_model(temporary / name)
                save_state(
                    temporary / name / TRAINER_FILENAME, trainer_state(trainer, n_training_steps)
                )
        own = _own_state(trainers, data)
        save_state(temporary / _own_filename(), State({**own.values, **values}, own.tensors))
    remove_checkpoints(checkpoints(folder.parent)[:-KEPT])


def load_checkpoint(folder: Path, trainers: Mapping[str, SAETrainer[Any, Any]]) -> None:
    """Restore trainers, crosscoders and random number generators from a checkpoint.

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


def load_place(folder: Path) -> tuple[StreamState | None, dict[str, Any]]:
    """Load a checkpoint's data stream state on this rank, and the values saved with it.

    Raises:
        ValueError: A file of the checkpoint is missing or damaged.
    """
    check_files(folder)
    with _readable(folder):
        values, tensors = _load(folder / _own_filename())
        data = values.pop("data")
        if not isinstance(data, dict | None):
            raise TypeError(f"its place is {data!r:.80}.")
        return None if data is None else StreamState(data, _under("data.", tensors)), values


def settings_in(folder: Path) -> Any:
    """The settings saved in a checkpoint, read without verifying its checksums.

    Raises:
        ValueError: Its file is missing or damaged.
    """
    return load_values(folder / _own_filename()).get("cfg")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def remove_checkpoints(folders: Sequence[Path]) -> None:
    """Remove these checkpoints, on rank 0."""
    distributed.wait()
    if distributed.rank() == 0:
        for folder in folders:
            shutil.rmtree(folder)


def _own_state(trainers: Mapping[str, SAETrainer[Any, Any]], data: StreamState | None) -> State:
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
        raise ValueError(f"Checkpoint {path} cannot be read: {said_by(error)} {_REMOVE}") from error


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Convert errors of torch and SAELens on an invalid state into one that names the remedy."""
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
        if str(error).endswith(_REMOVE):
            raise
        raise ValueError(
            f"Checkpoint {folder} cannot be read: {said_by(error)} {_REMOVE}"
        ) from error


def _own_filename() -> str:
    return f"rank-{distributed.rank():05d}.safetensors"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


@contextmanager
def _made_by_all(folder: Path) -> Iterator[Path]:
    """A temporary folder for all ranks to write into, renamed to `folder` when all are done."""
    temporary = folder.with_name(f".{folder.name}{_NEW}")
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.wait()
    try:
        with os_errors():
            yield temporary
        distributed.wait()
        if distributed.rank() == 0:
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            sums = {str(path.relative_to(temporary)): checksum(path) for path in files}
            (temporary / SUMS_FILENAME).write_text(json.dumps(sums, indent=1))
            with_usual_modes(temporary)
            _put_in_place(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"Could not write checkpoint {folder}: {said_by(error)} Earlier ones are kept: make room and continue with --resume."
        ) from error
    distributed.wait()


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename it; an existing checkpoint of the same step is kept until then."""
    superseded = folder.with_name(f".{folder.name}{_OLD}")
    if folder.exists():
        folder.rename(superseded)
    temporary.rename(folder)
    shutil.rmtree(superseded, ignore_errors=True)


def tidy_checkpoints(path: Path) -> None:
    """Remove partial checkpoints of a killed process, in a folder that only the caller uses."""
    for left in path.glob(f".*{_NEW}"):
        kept = path / left.name.removeprefix(".").removesuffix(_OLD)
        if left.name.endswith(_OLD) and not kept.exists():
            left.rename(kept)
        else:
            shutil.rmtree(left, ignore_errors=True)


def check_files(folder: Path) -> None:
    """Verify the checksums of all files of a checkpoint, without opening any file outside it.

    Raises:
        ValueError: A file is damaged, missing or unexpected.
    """
    try:
        sums = read_object(folder / SUMS_FILENAME)
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        there = {str(path.relative_to(folder)): path for path in files if path.name[0] != "."}
        del there[SUMS_FILENAME]
        links = [name for name, path in there.items() if path.is_symlink()]
        if links or sums.keys() != there.keys():
            odd = sorted(links or sums.keys() ^ there.keys())
            raise ValueError(f"{odd[0]!r:.80} is a link, missing, or not part of it.")
        damaged = [name for name, path in there.items() if checksum(path) != sums[name]]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Checkpoint {folder} cannot be read: {said_by(error)} {_REMOVE}"
        ) from error
    if damaged:
        raise ValueError(f"Checkpoint {folder} is damaged: {', '.join(damaged)}. {_REMOVE}")
