"""Runs the BatchTopK trainer of the package dictionary-learning
(github.com/saprmarks/dictionary_learning), if installed."""

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.peers.stand_ins import importable
from sae_lens_dfc.core.terminal import said_by

DISTRIBUTION = "dictionary-learning"
PACKAGE = "dictionary_learning"
HOW_TO_INSTALL = "pip install --no-deps dictionary-learning==0.1.0"
# Its trainer learns the threshold only after 1,000 steps, so a typical step is a later one.
FIRST_STEP = 2_000
TOTAL_STEPS = 100_000


class DictionaryLearning(NamedTuple):
    """The parts of the package needed for training."""

    train: Callable[..., None]
    """`trainSAE`."""
    trainer: type[Any]
    """`BatchTopKTrainer`."""


def missing() -> str | None:
    """Installation advice if the package is not installed; none if it is."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed. Install it with `{HOW_TO_INSTALL}`."
    return None


def load_dictionary_learning() -> DictionaryLearning:
    """Import the installed package, even if some of its dependencies are missing.

    Raises:
        ValueError: The package is not installed, or cannot be imported.
    """
    if (what_to_do := missing()) is not None:
        raise ValueError(what_to_do)
    folder = Path(str(distribution(DISTRIBUTION).locate_file("")))
    try:
        with importable(folder, PACKAGE):
            training = importlib.import_module(f"{PACKAGE}.training")
            trainers = importlib.import_module(f"{PACKAGE}.trainers.batch_top_k")
            return DictionaryLearning(training.trainSAE, trainers.BatchTopKTrainer)
    # Any exception at import means an incompatible version.
    except Exception as error:
        raise ValueError(
            f"{DISTRIBUTION} could not be imported: {type(error).__name__}: {said_by(error)} "
            f"Install the supported version with `{HOW_TO_INSTALL}`."
        ) from error


def dictionary_learning_step(
    package: DictionaryLearning, d_in: int, d_sae: int, k: int, device: str
) -> Callable[[Tensor], Any]:
    """Set up a training with the package's defaults; returns a function that runs its next step.

    Args:
        package: From `load_dictionary_learning`.
        d_in: Width of both models together.
        d_sae: Number of latents.
        k: Active latents per pair.
        device: Training device.

    Returns:
        A function of a batch (pairs, d_in).
    """
    trainer = package.trainer(
        steps=TOTAL_STEPS,
        activation_dim=d_in,
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="none",
        device=device,
    )
    numbers = count(FIRST_STEP)
    return lambda batch: trainer.update(next(numbers), batch)
