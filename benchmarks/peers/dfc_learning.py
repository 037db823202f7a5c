"""Runs the training step of the public DFC code from a checkout of
github.com/superkaiba/dfc_learning."""

import importlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.peers.stand_ins import importable
from sae_lens_dfc.core.terminal import said_by

PACKAGE = "dictionary_learning"
TRAINER_FILE = f"{PACKAGE}/trainers/crosscoder.py"
CROSSCODER_FILE = f"{PACKAGE}/dictionary.py"
# Its trainer learns the threshold only after 1,000 steps, so a typical step is a later one.
FIRST_STEP = 2_000
TOTAL_STEPS = 100_000


class Reference(NamedTuple):
    """The two classes of a checkout needed for training."""

    trainer: type[Any]
    crosscoder: type[Any]


def load_reference(folder: Path) -> Reference:
    """Import the classes from a checkout, restoring `sys.path` and `sys.modules` afterwards.

    Args:
        folder: The checkout; its code is run.

    Raises:
        ValueError: The folder is not such a checkout, or its code cannot be imported.
    """
    for name in (TRAINER_FILE, CROSSCODER_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a checkout of github.com/superkaiba/dfc_learning: it has no {name}."
            )
    try:
        with importable(folder, PACKAGE):
            trainers = importlib.import_module(_module(TRAINER_FILE))
            crosscoders = importlib.import_module(_module(CROSSCODER_FILE))
            return Reference(
                trainers.BatchTopKCrossCoderTrainer,
                crosscoders.DedicatedFeatureBatchTopKCrossCoder,
            )
    # Any exception at import means that the folder is not usable.
    except Exception as error:
        raise ValueError(
            f"The reference in {folder} could not be imported: {type(error).__name__}: {said_by(error)}"
        ) from error


def reference_step(
    reference: Reference,
    d_model: int,
    d_sae: int,
    k: int,
    exclusive: tuple[float, float],
    device: str,
) -> Callable[[Tensor], Any]:
    """Set up a training of the reference; returns a function that runs its next step.

    Args:
        reference: From `load_reference`.
        d_model: Width of both models.
        d_sae: Number of latents.
        k: Active latents per pair.
        exclusive: Shares of A-exclusive and B-exclusive latents.
        device: Training device.

    Returns:
        A function of a batch (pairs, 2, d_model), which it may change.
    """
    trainer = reference.trainer(
        steps=TOTAL_STEPS,
        activation_dim=d_model,
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="none",
        dict_class=reference.crosscoder,
        dict_class_kwargs={
            "model_a_exclusive_pct": exclusive[0],
            "model_b_exclusive_pct": exclusive[1],
        },
        device=device,
    )
    numbers = count(FIRST_STEP)
    return lambda pairs: trainer.update(next(numbers), pairs)


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")
