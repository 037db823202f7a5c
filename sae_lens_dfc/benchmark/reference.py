"""The public DFC code's training step, from a checkout of github.com/superkaiba/dfc_learning, whose code is run."""

import importlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_lens_dfc.benchmark.imported import importable
from sae_lens_dfc.texts import first_line

PACKAGE = "dictionary_learning"
TRAINER_FILE = f"{PACKAGE}/trainers/crosscoder.py"
CROSSCODER_FILE = f"{PACKAGE}/dictionary.py"
# Its trainer learns the threshold after its first 1,000 steps: a step of a long training is one after those.
FIRST_STEP = 2_000
TOTAL_STEPS = 100_000


class Reference(NamedTuple):
    """The two classes of a checkout that make up a training."""

    trainer: type[Any]
    crosscoder: type[Any]


def load_reference(folder: Path) -> Reference:
    """Import the classes from a checkout, and leave `sys.path` and `sys.modules` as they were.

    Args:
        folder: The checkout; its code is run.

    Raises:
        ValueError: It is no such checkout, or its code cannot be imported.
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
    # Whatever its code raises at import, it is the folder that was wrong.
    except Exception as error:
        raise ValueError(
            f"The reference in {folder} could not be imported: {type(error).__name__}: {first_line(error)}"
        ) from error


def reference_step(
    reference: Reference,
    d_model: int,
    d_sae: int,
    k: int,
    exclusive: tuple[float, float],
    device: str,
) -> Callable[[Tensor], Any]:
    """A training of the reference, as a function that makes its next step.

    Args:
        reference: From `load_reference`.
        d_model: Width of both models.
        d_sae: Number of latents.
        k: Latents active on a pair.
        exclusive: Shares of the latents that only A, and only B, may use.
        device: Where it trains.

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
