"""Defines the options of `python -m benchmarks`. `--help` imports this file without any benchmark."""

import os
from dataclasses import dataclass
from typing import Literal

from simple_parsing import field

from sae_lens_dfc.core.flags import switch

NAMES = ("recovery", "planted", "certain", "step", "data", "evaluate", "all", "compare")
PRESETS = ("small", "full")
"""Presets of every benchmark except step."""


@dataclass(kw_only=True)
class StepConfig:
    """Sizes of the benchmarked training step, and its comparisons."""

    d_a: int = 512
    """Width of model A's activations; for step."""
    d_b: int = 512
    """Width of model B's activations; for step."""
    d_sae: int = 8192
    """Dictionary size; for step."""
    k: int = 32
    """Active latents per pair; for step."""
    batch: int = 1024
    """Pairs per training step; for step."""
    device: str = "cpu"
    """Training device; for step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the encoder product in our step; everything else is float32. For step."""
    rounds: int = 7
    """Rounds of all measurements in turn; a figure is the median over rounds. For step."""
    reference: str | None = None
    """Checkout of github.com/superkaiba/dfc_learning, whose training step is measured too. Runs the
    code in that folder, and requires models of equal width. For step."""

    @property
    def d_in(self) -> int:
        """Width of both models' activations together."""
        return self.d_a + self.d_b


@dataclass
class BenchmarkOptions(StepConfig):
    """Run benchmarks of recovery, training and data costs, and evaluation, or compare two sets of
    results."""

    name: str = field(positional=True, choices=NAMES)
    """recovery: recovery of known features on toy pairs for five architectures, the recipe
    dfc-reassigned, variants of both, and BatchTopK of SAELens and (if installed) dictionary-learning,
    over dictionary sizes, seeds, wrong pairs and a null. planted: five architectures on real models
    with a planted difference, scored by detection, ablation and addition. certain: pairs whose
    difference is certain (languages that one model has never read) beside pairs with nothing to
    find, with the latents that are called. step: cost of one DFC
    training step, relative to its encoder product and to other trainers. data: cost of harvesting,
    alignment, caching and shuffled reading, relative to their lower bounds. evaluate: a DFC and a
    BatchTopK crosscoder on the demo's models, over seeds, with nulls. all: all of these in turn.
    compare: what got worse between two folders or files of results; exit status 1 if anything
    did."""
    paths: list[str] = field(positional=True, nargs="*", default_factory=list, metavar="OLD NEW")
    """Folders or JSON files to compare; for compare."""
    preset: str = field(default="small", choices=PRESETS)
    """small: one to two minutes each on two cores, ten for all. full: the hours-long runs reported
    in benchmarks/README.md. For all but step."""
    output: str | None = None
    """Folder for the results. Existing results of recovery, planted, certain and evaluate are not
    recomputed, nor in all those of step and data. If None: runs/benchmark/ plus the preset's name,
    or step."""
    jobs: int = os.cpu_count() or 1
    """Crosscoders trained in parallel, one thread each; for recovery."""
    json: bool = switch()
    """Print the results as JSON; for compare."""
