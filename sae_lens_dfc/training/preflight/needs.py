"""Measures what `estimate.py` needs on a few batches where they fit in memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_lens_dfc.core.machine import free_disk, memory_of, peak_memory, resident_memory
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.preflight.estimate import (
    Disk,
    Memory,
    Speed,
    Times,
    crosscoder_memory,
    disk,
    harvest_of,
    rows_memory,
    times,
)
from sae_lens_dfc.training.preflight.first_look import FirstLook, of_a_pass, together
from sae_lens_dfc.training.preflight.rehearsal import (
    Harvested,
    Stepped,
    harvested,
    stepped,
)

SECONDS_TO_HARVEST = 6.0
SECONDS_TO_STEP = 3.0
PROCESSOR = "cpu"


class Room(NamedTuple):
    """Memory that a training takes on a device, and memory that the device has."""

    takes: Memory
    there: int
    """Bytes that the device has."""

    @property
    def is_enough(self) -> bool:
        return self.takes.total <= self.there


@dataclass(frozen=True)
class Needs:
    """Time, memory and disk space that a training takes, and the memory and disk space that the
    machine has."""

    n_steps: int
    distinct_pairs: float | None
    """Usable pairs in one pass over the text; none if its length is not known."""
    harvested_pairs: int
    """Pairs that the models must compute, in all passes."""
    harvest_rate: float
    """Pairs that the models compute per second."""
    step_seconds: float | None
    """Seconds per training step; none if it was not measured because the training does not fit in
    memory."""
    times: Times | None
    memory: dict[str, Room]
    """Memory for each device, by the device's name."""
    disk: Disk
    disk_there: int

    @property
    def passes(self) -> float:
        """Number of times that the models read the text; 0 if its length is not known."""
        return self.harvested_pairs / self.distinct_pairs if self.distinct_pairs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All needs as plain values, for JSON."""
        seconds = None if self.times is None else self.times._asdict() | {"total": self.times.total}
        return {
            **{name: value for name, value in vars(self).items() if name != "times"},
            "seconds": seconds,
            "memory": {
                name: {**room.takes._asdict(), "total": room.takes.total, "there": room.there}
                for name, room in self.memory.items()
            },
            "disk": {**asdict(self.disk), "total": self.disk.total},
        }


def measured_needs(
    pair: ModelPair,
    cfg: CrosscoderRunnerConfig,
    looks: Sequence[FirstLook],
    contexts: Sequence[Context],
) -> Needs:
    """Run the models and train on a few batches, and estimate what the whole training takes.

    Args:
        pair: The two models.
        cfg: The training.
        looks: Results from the first documents of each data set.
        contexts: Part of the text, at least one context.

    Raises:
        ValueError: The models or the crosscoder refuse these batches, as they would in training.
    """
    before = resident_memory()
    rows = harvested(pair, cfg, contexts, SECONDS_TO_HARVEST)
    d_in = pair.d_a + pair.d_b
    distinct = of_a_pass(looks, cfg)
    distinct = None if distinct is None else distinct * rows.usable
    memory = _memory(pair, cfg, before, rows, None, distinct)
    steps = None
    if all(room.is_enough for room in memory.values()):
        steps = stepped(pair, cfg, rows.acts, SECONDS_TO_STEP)
        memory = _memory(pair, cfg, before, rows, steps, distinct)
    return Needs(
        n_steps=cfg.training_steps,
        distinct_pairs=distinct,
        harvested_pairs=harvest_of(cfg, distinct).pairs,
        harvest_rate=rows.rate,
        step_seconds=None if steps is None else steps.seconds,
        times=None if steps is None else times(cfg, _speed(looks, rows, steps), distinct),
        memory=memory,
        disk=disk(cfg, d_in, distinct),
        disk_there=free_disk(Path(cfg.output_path or ".")),
    )


def _speed(looks: Sequence[FirstLook], rows: Harvested, steps: Stepped) -> Speed:
    reading = together(looks).pairs / sum(one.seconds for one in looks)
    return Speed(reading * rows.usable, rows.rate, steps.seconds)


def _memory(
    pair: ModelPair,
    cfg: CrosscoderRunnerConfig,
    before: int,
    rows: Harvested,
    steps: Stepped | None,
    distinct: float | None,
) -> dict[str, Room]:
    d_in = pair.d_a + pair.d_b
    measured = 0 if steps is None else steps.memory or 0
    crosscoder, own = max(crosscoder_memory(cfg, d_in), measured), _full_name(cfg.device)
    process = before + (rows.memory or 0)
    taken = {PROCESSOR: Memory(peak_memory(), process, 0, rows_memory(cfg, d_in, distinct))}
    for device in {str(pair.a.device), str(pair.b.device), own} - {PROCESSOR}:
        on_gpu = torch.cuda.max_memory_allocated(device)
        taken[device] = Memory(on_gpu, on_gpu, 0, 0)
    taken[own] = taken[own]._replace(crosscoder=crosscoder)
    return {device: Room(one, memory_of(torch.device(device))) for device, one in taken.items()}


def _full_name(device: str) -> str:
    """The device name with its index, as models report it.

    >>> _full_name("cpu")
    'cpu'
    """
    return str(torch.empty(0, device=device).device)
