"""The package dictionary-learning (github.com/saprmarks/dictionary_learning), where it is installed: its BatchTopK trainer."""

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_lens_dfc.benchmark.imported import importable
from sae_lens_dfc.texts import first_line

DISTRIBUTION = "dictionary-learning"
PACKAGE = "dictionary_learning"
HOW_TO_INSTALL = "pip install --no-deps dictionary-learning==0.1.0"
# Its trainer learns the threshold after its first 1,000 steps: a step of a long training is one after those.
FIRST_STEP = 2_000
TOTAL_STEPS = 100_000


class DictionaryLearning(NamedTuple):
    """What of the package makes up a training."""

    train: Callable[..., None]
    """`trainSAE`."""
    trainer: type[Any]
    """`BatchTopKTrainer`."""


def missing() -> str | None:
    """What to do where the package is not installed; none where it is."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed. Install it: {HOW_TO_INSTALL}"
    return None


def load_dictionary_learning() -> DictionaryLearning:
    """Import the installed package, whether or not all that it asks for is installed.

    Raises:
        ValueError: It is not installed, or cannot be imported.
    """
    if (what_to_do := missing()) is not None:
        raise ValueError(what_to_do)
    folder = Path(str(distribution(DISTRIBUTION).locate_file("")))
    try:
        with importable(folder, PACKAGE):
            training = importlib.import_module(f"{PACKAGE}.training")
            trainers = importlib.import_module(f"{PACKAGE}.trainers.batch_top_k")
            return DictionaryLearning(training.trainSAE, trainers.BatchTopKTrainer)
    # Whatever its code raises at import, it is another version's.
    except Exception as error:
        raise ValueError(
            f"{DISTRIBUTION} could not be imported: {type(error).__name__}: {first_line(error)} "
            f"Install the version that this was written for: {HOW_TO_INSTALL}"
        ) from error


def dictionary_learning_step(
    package: DictionaryLearning, d_in: int, d_sae: int, k: int, device: str
) -> Callable[[Tensor], Any]:
    """A training by the package's own defaults, as a function that makes its next step.

    Args:
        package: From `load_dictionary_learning`.
        d_in: Width of both models together.
        d_sae: Number of latents.
        k: Latents active on a pair.
        device: Where it trains.

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
